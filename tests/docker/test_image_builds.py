"""Images built by a real engine from real wheels. What needs CUDA to compile is stubbed in the base (docker/stub)."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.machine import image_build
from sparktune.setup.machine.image import HASH_LABEL, Flavour, ensure_image

pytestmark = [pytest.mark.docker, pytest.mark.timeout(2400), pytest.mark.xdist_group("docker-engine")]
ROOT = Path(__file__).resolve().parents[2]


def ignore(event: dict[str, Any]) -> None:
    """Takes events that a test does not look at."""


def pip_check(client: Any, tag: str) -> list[str]:
    """Returns what `pip check` prints inside an image, sorted."""
    done = client.containers.run(
        tag, ["sh", "-c", "python -m pip check || true"], remove=True, network_mode="none"
    )
    return sorted(line for line in done.decode().splitlines() if line.strip())


def test_the_fast_image_builds_once(client: Any, engine: Any, checkout: Any) -> None:
    """opt, 2026.05, BuildKit: build; nothing to do; one changed pin."""
    events: list[dict[str, Any]] = []
    first = ensure_image(client, checkout.root, "2026.05", "opt", on_event=events.append)
    assert first.built
    assert {first.tag, first.alias} <= engine.tags()
    attributes = client.images.get(first.tag).attrs["Config"]
    assert attributes["User"] == "10001"
    assert attributes["Labels"][HASH_LABEL][:12] == first.tag[-12:]
    assert attributes["Labels"]["org.opencontainers.image.licenses"] == "MIT"
    assert attributes["Labels"]["org.opencontainers.image.base.digest"] == first.base
    assert pip_check(client, first.tag) == [
        "unsloth 2026.5.2 has requirement torch<2.11.0,>=2.4.0, but you have torch 2.11.0a0+stub.",
        "unsloth-zoo 2026.5.1 has requirement torch<2.11.0,>=2.4.0, but you have torch 2.11.0a0+stub.",
    ]
    log = first.log.read_text(encoding="utf-8")
    assert "pip check: 2 lines, all known for this stack" in log
    assert "Successfully installed causal-conv1d-1.6.1" in log
    assert "vendor/llama.cpp at 0c1e57098bba43ac29e6e3b677cdceebdd22334f" in log
    assert "-DCMAKE_CUDA_ARCHITECTURES=121a" in log
    bill = json.loads(first.log.with_suffix(".sbom.json").read_text(encoding="utf-8"))
    assert bill["bomFormat"] == "CycloneDX"
    assert {"transformers", "unsloth", "causal-conv1d"} <= {
        c["name"].lower().replace("_", "-") for c in bill["components"]
    }
    assert "transformers==5.5.0" in first.log.with_suffix(".freeze.txt").read_text(encoding="utf-8")
    steps = [e for e in events if e["kind"] == "progress"]
    assert steps[-1]["done"] == steps[-1]["total"]
    assert all(a["done"] <= b["done"] for a, b in itertools.pairwise(steps))
    assert {"phase", "done", "total", "elapsed_s", "remaining_s", "last"} <= steps[0].keys()

    begun = time.monotonic()
    second = ensure_image(client, checkout.root, "2026.05", "opt", on_event=ignore)
    assert time.monotonic() - begun < 3
    assert (second.id, second.built) == (first.id, False)

    other = checkout.stack("2026.10", "sources.lock").read_text(encoding="utf-8")
    checkout.stack("2026.05", "sources.lock").write_text(other, encoding="utf-8")
    again: list[dict[str, Any]] = []
    third = ensure_image(client, checkout.root, "2026.05", "opt", on_event=again.append)
    log = third.log.read_text(encoding="utf-8")
    assert third.tag != first.tag
    assert "Successfully installed causal-conv1d-1.7.0" in log
    assert "Successfully installed absl" not in log, "the pins below must come from the cache"
    assert "stub cmake" not in log, "llama.cpp does not depend on that pin"
    assert any(e.get("remaining_s") for e in again), "the first build's times give the next one an estimate"


def test_the_baseline_image_stands_on_the_same_packages(client: Any) -> None:
    """baseline, 2026.05: the layer that pip made for the fast image is this one's too."""
    made = ensure_image(client, ROOT, "2026.05", "baseline", on_event=ignore)
    log = made.log.read_text(encoding="utf-8")
    assert "Successfully installed absl" not in log, "both Dockerfiles must have their first steps in common"
    assert len(pip_check(client, made.tag)) == 2
    environment = dict(e.partition("=")[::2] for e in client.images.get(made.tag).attrs["Config"]["Env"])
    assert environment["TORCHDYNAMO_DISABLE"] == "1"


@pytest.mark.parametrize("flavour", ["opt", "baseline"])
def test_the_newest_stack_agrees_with_itself(client: Any, flavour: Flavour) -> None:
    """2026.10: `pip check` prints nothing."""
    made = ensure_image(client, ROOT, "2026.10", flavour, on_event=ignore)
    assert "pip check: 0 lines, all known for this stack" in made.log.read_text(encoding="utf-8")
    assert pip_check(client, made.tag) == ["No broken requirements found."]


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["2026.05", "2026.10"])
def test_the_fast_image_builds_without_buildkit(client: Any, monkeypatch: pytest.MonkeyPatch, stack: str) -> None:
    monkeypatch.setattr(image_build, "_clients", list)
    made = ensure_image(client, ROOT, stack, "opt", on_event=ignore, rebuild="clean")
    assert made.built
    assert len(pip_check(client, made.tag)) == {"2026.05": 2, "2026.10": 1}[stack]


@pytest.mark.parametrize("builder", ["client", "sdk"])
def test_a_rebuild_reuses_layers_and_a_clean_one_none(
    client: Any, engine: Any, checkout: Any, monkeypatch: pytest.MonkeyPatch, builder: str
) -> None:
    if builder == "sdk":
        monkeypatch.setattr(image_build, "_clients", list)
    checkout.shrink("2026.10")
    (checkout.root / "train.py").write_text(f"# {builder}\n", encoding="utf-8")  # an image that nobody has
    events: list[dict[str, Any]] = []
    made = ensure_image(client, checkout.root, "2026.10", "baseline", on_event=events.append)
    chosen = {e["chosen"] for e in events if e["kind"] == "choice"}
    assert chosen <= ({"sdk"} if builder == "sdk" else {"buildx", "buildkit"})  # the latter without the plugin
    assert len(chosen) == 1
    assert events[-1]["total"] > 15

    again = ensure_image(client, checkout.root, "2026.10", "baseline", on_event=ignore, rebuild="yes")
    assert again.built
    assert "Successfully installed six" not in again.log.read_text(encoding="utf-8")

    (checkout.root / "train.py").write_text("# another line\n", encoding="utf-8")
    changed = ensure_image(client, checkout.root, "2026.10", "baseline", on_event=ignore)
    assert changed.tag != made.tag
    assert "Successfully installed six" not in changed.log.read_text(encoding="utf-8"), "ours are the last layers"
    made, seen = changed, []

    def watch(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and not seen:
            seen.append(made.tag in engine.tags())

    clean = ensure_image(client, checkout.root, "2026.10", "baseline", on_event=watch, rebuild="clean")
    assert seen == [False], "the old image goes before the new one is built"
    assert clean.tag == made.tag
    assert clean.id != made.id
    log = clean.log.read_text(encoding="utf-8")
    assert "Successfully installed six" in log
    assert "Using cache" not in log
    assert {clean.tag, clean.alias} <= engine.tags()


def test_without_any_client_the_sdk_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The choice itself: a client without the plugin is no builder from version 23 on."""
    assert shutil.which("docker") is not None
    folder = tmp_path / "bin"
    folder.mkdir()
    client = folder / "docker"
    client.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Docker version 28.2.2, build x" && exit 0\nexit 1\n')
    client.chmod(0o755)
    request = image_build.BuildRequest(context=ROOT, dockerfile="docker/Dockerfile", tag="t", build_args={},
                                       network="host", log=tmp_path / "log")
    monkeypatch.setenv("PATH", str(folder))
    assert image_build.builder_command(request)[0] == "sdk"
    client.write_text('#!/bin/sh\necho "Docker version 20.10.24+dfsg1, build x"\n[ "$1" != buildx ]\n')
    name, argv, env = image_build.builder_command(request)
    assert (name, argv[0], env["DOCKER_BUILDKIT"]) == ("buildkit", str(client), "1")
