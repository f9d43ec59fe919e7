"""The printed commands and the merged model's weights, against what the pinned vLLM and SGLang accept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sparktune.lab.serving_facts import VERSIONS, check_command, check_weights, read_sglang, read_vllm
from sparktune.setup.export.handover import serving_commands
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import cache_dir

FACTS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("serving_facts.json").read_text())
SERVERS = {"vLLM": "vllm", "SGLang": "sglang"}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("with_mtp", [True, False])
def test_every_printed_flag_is_one_the_server_has(tiny_base: Path, server: str, with_mtp: bool) -> None:
    facts = FACTS[SERVERS[server]]
    command = serving_commands(probe(str(tiny_base)), tiny_base, mtp=tiny_base if with_mtp else None)[server]
    assert check_command(command, facts) == []
    assert ("spec" in command) is with_mtp
    changes = {"--language-model-only": "--text-only", '"method":"mtp"': '"method":"mpt"',
               "num_speculative_tokens": "num_draft_tokens", "NEXTN": "NEXT", "--model-path": "--model-folder",
               "--speculative-eagle-topk": "--speculative-topk"}
    for old, new in changes.items():
        if old in command:
            assert len(check_command(command.replace(old, new), facts)) == 1, new


@pytest.mark.parametrize("server", SERVERS.values())
def test_every_weight_has_a_place_and_its_shape(tiny_base: Path, tiny_base_untied: Path, server: str) -> None:
    assert check_weights(tiny_base, FACTS[server]) == []
    assert check_weights(tiny_base_untied, FACTS[server]) == []


@pytest.mark.parametrize("server", SERVERS.values())
def test_a_renamed_or_reshaped_weight_fails(tiny_base_untied: Path, tmp_path: Path, server: str) -> None:
    tensors = load_file(tiny_base_untied / "model.safetensors")
    prefix = "model.language_model.layers.0."
    renames = {f"{prefix}linear_attn.in_proj_z.weight": f"{prefix}linear_attn.in_proj_gate.weight",
               f"{prefix}input_layernorm.weight": f"{prefix}input_norm.weight",
               "mtp.fc.weight": "mtp.eh_proj.weight",
               "mtp.layers.0.self_attn.q_proj.weight": "mtp.layers.0.attn.q_proj.weight",
               "model.language_model.norm.weight": "model.language_model.final_norm.weight"}
    for number, (old, new) in enumerate(renames.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(tiny_base_untied / "config.json", folder)
        save_file({new if n == old else n: t for n, t in tensors.items()}, folder / "model.safetensors")
        found = check_weights(folder, FACTS[server])
        assert len(found) == 1, new
        assert found[0].startswith(f"{new}: no ")
    config = json.loads((tiny_base_untied / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    assert any("k_proj.weight: has the shape" in text for text in check_weights(folder, FACTS[server]))


@pytest.mark.slow
@pytest.mark.parametrize(("package", "read"), [("vllm", read_vllm), ("sglang", read_sglang)])
def test_the_facts_are_the_pinned_wheels(package: str, read: Any) -> None:
    """Fetches the wheel once (vLLM 340 MB, SGLang 40 MB), without anything it depends on."""
    folder = cache_dir("serving") / f"{package}-{VERSIONS[package]}"
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        platforms = [w for p in ("manylinux_2_28_x86_64", "manylinux_2_34_x86_64") for w in ("--platform", p)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
             "--python-version", "3.12", *platforms, "--dest", str(folder), f"{package}=={VERSIONS[package]}"],
            check=True, timeout=1200,
        )
        wheels = sorted(folder.glob("*.whl"))
    assert read(wheels[0]) == FACTS[package]
