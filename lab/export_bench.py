"""Wall time and peak memory of merge and export for a 2B-shaped model: one row a step in docs/results/export.csv.

    python -m sparktune.lab.export_bench [--shape 2b|tiny] [--types bf16,q8_0] [--work DIR] [--out FILE.csv]

Weights are random, in the multimodal layout with an MTP head; every step is a process of its own. Peaks are of the
process (resident memory) and, where it used one, of the GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparktune.lab.table import append_rows

__all__ = ["SHAPES", "main", "make_base"]

SHAPES: dict[str, dict[str, int]] = {
    "2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 8,
           "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
           "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320},
    "tiny": {},
}
"""Fields of the text config that differ from the demo model's. Source: Qwen3.5-2B's config.json."""


def make_base(folder: Path, shape: str) -> None:
    """Writes a base of `shape`: the demo model's files with a larger text tower, weights drawn on the GPU if any."""
    import torch
    from safetensors.torch import save_file

    from sparktune.setup.demo_model import make_model
    from sparktune.setup.plan.models import probe
    from sparktune.setup.plan.weights import text_tower_shapes

    make_model(folder, vocab_size=4096, sharded=False)
    if not SHAPES[shape]:
        return
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text |= SHAPES[shape]
    text["layer_types"] = ["full_attention" if i % 4 == 3 else "linear_attention"
                           for i in range(text["num_hidden_layers"])]
    (folder / "config.json").write_text(json.dumps(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    h, i, d = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    n, kv = text["num_attention_heads"], text["num_key_value_heads"]
    shapes: dict[str, Sequence[int]] = dict(text_tower_shapes(probe(str(folder))))
    block = {"input_layernorm": [h], "post_attention_layernorm": [h], "self_attn.q_proj": [2 * n * d, h],
             "self_attn.k_proj": [kv * d, h], "self_attn.v_proj": [kv * d, h], "self_attn.o_proj": [h, n * d],
             "self_attn.q_norm": [d], "self_attn.k_norm": [d], "mlp.gate_proj": [i, h], "mlp.up_proj": [i, h],
             "mlp.down_proj": [h, i]}
    shapes |= {f"mtp.layers.0.{k}.weight": v for k, v in block.items()}
    shapes |= {"mtp.fc.weight": [h, 2 * h], "mtp.norm.weight": [h], "mtp.pre_fc_norm_embedding.weight": [h],
               "mtp.pre_fc_norm_hidden.weight": [h]}
    for name, size in shapes.items():
        drawn = torch.empty(list(size), dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
        there = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        tensors[there] = drawn.abs().cpu() if name.endswith("A_log") else drawn.cpu()
    save_file(tensors, folder / "model.safetensors")


def make_adapter(folder: Path, base: Path) -> None:
    """Writes a LoRA adapter of rank 32 over q_proj, o_proj and the MLP, in PEFT's names."""
    import torch
    from safetensors.torch import save_file

    from sparktune.setup.plan.models import probe
    from sparktune.setup.plan.weights import text_tower_shapes

    targets = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tensors = {}
    for name, (rows, columns) in ((n, s) for n, s in text_tower_shapes(probe(str(base))).items()
                                  if n.endswith(tuple(f"{t}.weight" for t in targets))):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(32, columns) * 0.01
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 32) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 32, "lora_alpha": 32,
        "target_modules": list(targets), "bias": "none", "lora_dropout": 0.0}))


def _timed(name: str, command: list[str], log: Path) -> dict[str, Any]:
    begun = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {"step": name, "seconds": round(time.monotonic() - begun, 2),
            "peak_rss_gib": round(usage.ru_maxrss / 2**20, 3), "exit_code": process.returncode}


def _machine() -> dict[str, str]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "cpus": str(len(os.sched_getaffinity(0))), "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"), "transformers": importlib.metadata.version("transformers")}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps, prints each row, appends them. Returns 0 when every step ended well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--types", default="bf16,q8_0")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    facts = _machine()
    with tempfile.TemporaryDirectory(prefix="sparktune-export-") as scratch:
        work = args.work or Path(scratch)
        base, adapter, merged, log = work / "base", work / "adapter", work / "merged", work / "log.txt"
        make_base(base, args.shape)
        make_adapter(adapter, base)
        python = [sys.executable, "-P", "-m"]
        jobs = [("merge", [*python, "sparktune.setup.export.merge", "--adapter", str(adapter), "--out", str(merged)])]
        jobs += [(f"gguf {kind}", [*python, "sparktune.setup.export.gguf", "--model", str(merged), "--out",
                                   str(work / f"{kind}-gguf"), "--types", kind]) for kind in args.types.split(",")]
        for name, command in jobs:
            row = {"shape": args.shape, **_timed(name, command, log), **facts}
            size = sum(f.stat().st_size for f in (work / f"{name.split()[-1]}-gguf").glob("*.gguf"))
            row["gb_written"] = round((size or sum(f.stat().st_size for f in merged.glob("*.safetensors"))) / 1e9, 3)
            print(json.dumps(row), flush=True)
            if args.out is not None:
                append_rows(args.out, [row])  # at once: a bench that is cut short keeps what it measured
            if row["exit_code"]:
                print("\n".join(log.read_text("utf-8", "replace").splitlines()[-15:]), file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
