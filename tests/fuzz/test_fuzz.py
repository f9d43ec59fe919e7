"""The fuzzer: a sample of it, what it found once, and that it can find."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparktune.lab import fuzz, fuzz_targets
from sparktune.setup.plan.errors import SparktuneError

FOUND = [json.loads(line) for line in (Path(__file__).parent / "found.jsonl").read_text().splitlines()]
"""Every input that once was a finding: its reader and its bytes."""


@pytest.fixture(scope="session")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Callable[[bytes], None]]:
    made: dict[str, Callable[[bytes], None]] = {}

    def check(target: str) -> Callable[[bytes], None]:
        if target not in made:
            made[target] = fuzz_targets.TARGETS[target].make(tmp_path_factory.mktemp(target))
        return made[target]

    return check


@pytest.mark.parametrize("target", sorted({row["target"] for row in FOUND}))
def test_what_was_found_once_is_refused_in_a_sentence_now(
    target: str, checks: Callable[[str], Callable[[bytes], None]]
) -> None:
    for row in FOUND:
        if row["target"] == target:
            checks(target)(base64.b64decode(row["input"]))


def test_every_seed_passes_its_own_check(checks: Callable[[str], Callable[[bytes], None]]) -> None:
    for name, target in fuzz_targets.TARGETS.items():
        for seed in target.seeds:
            checks(name)(seed)


def test_a_sample_of_every_reader(tmp_path: Path) -> None:
    found = tmp_path / "found"
    assert fuzz.main(["--blind", "--executions", "5000", "--seed", "3", "--found", str(found)]) == 0
    assert not found.exists()


PLANTED = '''
import os, sys, time
from pathlib import Path
from sparktune.lab import fuzz, fuzz_targets
def crash(data): raise KeyError("planted")
def hang(data):
    while True: time.sleep(0.01)
def eat(data): bytearray(2 * 2**30)
def write(data):
    try: Path(sys.argv[2], "outside").write_text("x")
    except Exception: pass
def start(data): os.system("true")
def quiet(data):
    from sparktune.setup.plan.errors import SparktuneError
    fuzz_targets.refused(lambda: (_ for _ in ()).throw(SparktuneError(" ")))
TARGETS = fuzz_targets.TARGETS
for name in list(TARGETS): del TARGETS[name]
TARGETS["planted"] = fuzz_targets.Target(name="planted", about="", make=lambda scratch: globals()[sys.argv[1]],
                                         seeds=(b"x",), mutation=lambda rng, data: data, share=1)
sys.exit(fuzz.main(["--child", "--blind", "--target", "planted", "--executions", "1", "--limit", "1", "--memory", "512",
                    "--found", sys.argv[2] + "/found"]))
'''


@pytest.mark.parametrize(
    ("fault", "seen"),
    [("crash", "KeyError"), ("hang", "longer than 1 s"), ("eat", "MemoryError"), ("write", "open for writing"),
     ("start", "os.system"), ("quiet", "says nothing")],
)
def test_it_finds_a_planted_fault(fault: str, seen: str, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-P", "-c", PLANTED, fault, str(tmp_path)], capture_output=True, text=True, check=False,
    )
    assert made.returncode == 77, made.stderr
    assert seen in made.stderr
    assert [p.read_bytes() for p in (tmp_path / "found").iterdir()] == [b"x"]
    assert not (tmp_path / "outside").exists()


def test_a_refusal_is_one_of_ours() -> None:
    def refuse() -> None:
        raise SparktuneError("expected this, seen that, do this")

    assert fuzz_targets.refused(refuse) is None
    with pytest.raises(fuzz_targets.Broken):
        fuzz_targets.refused(lambda: (_ for _ in ()).throw(SparktuneError("x" * 4000)))
