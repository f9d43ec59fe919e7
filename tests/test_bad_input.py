"""Bad and hostile input through both commands, as processes: a sentence and the documented exit code, no traceback.

Slow, and as root: two cases mount a small file system and one that cannot be written.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparktune.setup.demo import make_model, write_smoke

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[1]
RUN_SH = [sys.executable, "-P", "-m", "sparktune.setup.cli"]
TRAIN = [sys.executable, str(ROOT / "train.py")]
NEW = {"run.sh": [*RUN_SH, "--non-interactive", "--backend", "local", "--gguf", "none", "--mtp", "skip"],
       "train.py": [*TRAIN, "--no-tensorboard"]}
FEW = ["--mode", "lora", "--max-steps", "4", "--save-steps", "1", "--lora-r", "4", "--learning-rate", "1e-3",
       "--eval-split", "0", "--pack-length", "128"]
PLENTY = 3 * 2**30
"""Of private memory: a reader that took a line of 1 GB whole, and decoded it, would need more."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bad")
    make_model(folder / "tiny", vocab_size=512, dtype="float32", sharded=False)
    write_smoke(folder / "d.jsonl")
    yield folder
    for mounted in ("small", "readonly"):
        if os.path.ismount(folder / mounted):
            subprocess.run(["umount", "-l", str(folder / mounted)], check=True)


def start(place: Path, argv: list[str]) -> tuple[int, str]:
    """Runs a command in `place`; returns its exit code and all it said."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_")}
    env = {**kept, "XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1"}
    done = subprocess.run(
        argv, cwd=place, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (PLENTY, PLENTY)),
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert [c for c in said if not (c.isprintable() or c in "\n\t")] == [], ascii(said)
    return done.returncode, said


def refused(place: Path, command: str, words: list[str], code: int, sentence: str) -> None:
    """Starts a new run that must be refused, and must leave no run behind."""
    seen, said = start(place, [*NEW[command], *FEW, *words])
    assert (seen, sentence in said) == (code, True), f"exit {seen}, expected {code} and {sentence!r}:\n{said[-3000:]}"
    assert not (place / "results" / "bad").exists()


def truncated_base(place: Path) -> list[str]:
    shutil.copytree(place / "tiny", place / "cut", dirs_exist_ok=True)
    weights = next((place / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4096])
    return ["--model", "cut", "--data", "d.jsonl", "--name", "bad"]


def tagged_plan(place: Path) -> list[str]:
    (place / "tagged.yaml").write_text("seed: !!python/object/apply:os.system ['touch PWNED']\n")
    return ["--config", "tagged.yaml", "--model", "tiny", "--data", "d.jsonl", "--name", "bad"]


def results_at_the_root(place: Path) -> list[str]:
    if not (place / "rooted").is_symlink():
        (place / "rooted").symlink_to("/")
    return ["--model", "tiny", "--data", "d.jsonl", "--name", "bad", "--results", "rooted"]


def name_that_climbs(place: Path) -> list[str]:
    return ["--model", "tiny", "--data", "d.jsonl", "--name", "../../x"]


def name_with_escapes(place: Path) -> list[str]:
    return ["--model", "tiny", "--data", "d.jsonl", "--name", "\x1b[2J\x1b]0;title\x07"]


def data_of_nothing_but_nuls(place: Path) -> list[str]:
    (place / "nul.jsonl").write_bytes(b'{"text": "a\x00b"}\n' * 3 + b"\x00" * 4096 + b"\n")
    return ["--model", "tiny", "--data", "nul.jsonl", "--name", "bad"]


def line_of_a_gigabyte(place: Path) -> list[str]:
    if not (place / "long.jsonl").exists():
        with (place / "long.jsonl").open("wb") as file:
            file.write(b'{"text": "')
            for _ in range(1024):
                file.write(b"a" * 2**20)
            file.write(b'"}\n')
    return ["--model", "tiny", "--data", "long.jsonl", "--name", "bad"]


def pipe_for_data(place: Path) -> list[str]:
    if not (place / "pipe").exists():
        os.mkfifo(place / "pipe")
    return ["--model", "tiny", "--data", "pipe", "--name", "bad"]


def mount(place: Path, name: str, options: str) -> None:
    (place / name).mkdir(exist_ok=True)
    if not os.path.ismount(place / name):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place / name)], capture_output=True,
                              text=True, check=False)
        assert done.returncode == 0, f"This test mounts a tmpfs, which needs root: {done.stderr}"


def results_read_only(place: Path) -> list[str]:
    mount(place, "readonly", "ro")
    return ["--model", "tiny", "--data", "d.jsonl", "--name", "bad", "--results", "readonly"]


def no_space(place: Path) -> list[str]:
    mount(place, "small", "size=256k")
    return ["--model", "tiny", "--data", "d.jsonl", "--name", "bad", "--results", "small"]


Case = Callable[[Path], list[str]]
CASES: list[tuple[Case, int, str, str]] = [  # exit code, what run.sh says, what train.py says
    (truncated_base, 3, "describes", "describes"),
    (tagged_plan, 2, "is not read here", "is not read here"),
    (results_at_the_root, 2, "root of the file system", "root of the file system"),
    (name_that_climbs, 2, "--name takes", "--name takes"),
    (name_with_escapes, 2, "--name takes", "--name takes"),
    (data_of_nothing_but_nuls, 4, "Line 1: expected a JSON object", "Line 1: expected a JSON object"),
    (line_of_a_gigabyte, 4, "64 MiB", "64 MiB"),
    (pipe_for_data, 4, "is not a file", "it is a pipe or a device"),
    (results_read_only, 3, "Read-only file system", "Read-only file system"),
    (no_space, 3, "this run writes about", "is free. Free some space"),
]


@pytest.mark.parametrize("command", NEW)
@pytest.mark.parametrize(("case", "code", "said", "said_by_train"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_new_run_is_refused(
    place: Path, command: str, case: Case, code: int, said: str, said_by_train: str
) -> None:
    refused(place, command, case(place), code, said if command == "run.sh" else said_by_train)
    assert not (place / "PWNED").exists()
    assert not (place.parent.parent / "x").exists()
    assert not Path("/bad").exists()


def flipped(checkpoint: Path) -> None:
    path = checkpoint / "engine.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_damage_in_a_run_is_told_and_the_run_goes_on_from_what_is_good(place: Path) -> None:
    """A bit flipped in the newest checkpoint; then in all of them; then a tag in the run's own plan."""
    words = ["--model", "tiny", "--data", "d.jsonl", "--name", "good"]
    assert start(place, [*NEW["run.sh"], *FEW, *words])[0] == 0
    run = place / "results" / "good"
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for command in ([*RUN_SH, "resume", "good"], [*TRAIN, "--resume-from-checkpoint", "results/good"]):
        shutil.rmtree(run / "adapter")
        flipped(max(run.glob("checkpoint-?")))
        code, said = start(place, command)
        assert (code, "engine.safetensors changed after it was written" in said) == (0, True), said
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    for command in ([*RUN_SH, "resume", "good"], [*TRAIN, "--resume-from-checkpoint", "results/good"]):
        shutil.rmtree(run / "adapter", ignore_errors=True)
        for checkpoint in run.glob("checkpoint-?"):
            flipped(checkpoint)
        if not list(run.glob("checkpoint-?")):
            next(run.glob("checkpoint-?.damaged")).rename(run / "checkpoint-4")
        code, said = start(place, command)
        assert (code, "can be resumed from" in said) == (1, True), said
    state = json.loads((run / "state.json").read_text())
    assert "train" not in state["stages"]
    (run / "plan.yaml").write_text((run / "plan.yaml").read_text() + "\nseed: !!python/name:os.system\n")
    for command in ([*RUN_SH, "resume", "good"], [*TRAIN, "--resume-from-checkpoint", "results/good"]):
        code, said = start(place, command)
        assert (code, "is not read here" in said or "given twice" in said) == (2, True), said
