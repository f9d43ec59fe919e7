"""A rank is killed, freezes, hangs, refuses or is cut off: the others stop soon, one sentence says why, all is kept.

The limits are 15 s instead of a user's 20 (training/heartbeat.py), whose judgement test_heartbeat.py samples in the
default tier.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.demo import make_model, write_smoke
from sparktune.training import checkpoint as cp

pytestmark = [pytest.mark.timeout(280), pytest.mark.xdist_group("ranks")]

ROOT = Path(__file__).resolve().parents[3]
FAULTS = {
    # case -> fault, the rank that has it, mode, words of the one sentence
    "killed": ("killed", 1, "lora", "No sign of life for 15 s from rank 1 (process"),
    "first-killed": ("killed", 0, "full", "No sign of life for 15 s from rank 0 (process"),
    "frozen": ("frozen", 1, "full", "No sign of life for 15 s from rank 1 (process"),
    "stuck": ("stuck", 1, "lora", "is stuck in step 4"),
    "hung": ("hung", 1, "lora", "No rank finished step 4 in 20 s"),
    "hung-spread": ("stuck", 0, "full", "No rank finished step 4 in 20 s"),
    "refused": ("refused", 1, "lora", "The disk of rank 1 said no."),
}
FAULT_STEP = 4


def run(folder: Path, cases: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Runs the cases at once; returns case -> rank -> (exit code, time of its end)."""
    (folder / "spec.json").write_text(json.dumps({"work": str(folder), "cases": cases, "patience_s": 150}))
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "faults_worker.py"), str(folder / "spec.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250, check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "ended.json").read_text())


def case_of(name: str, model: Path, fault: str, rank: int, mode: str) -> dict[str, Any]:
    return {"name": name, "fault": fault, "rank": rank, "mode": mode, "model": str(model), "dtype": "float32",
            "dropout": 0.0, "recompute": "none", "resumed": False}


def said(folder: Path, name: str) -> list[str]:
    return [line for rank in (0, 1) for line in (folder / f"{name}-{rank}.txt").read_text().splitlines()]


def assert_loadable(folder: Path, name: str) -> None:
    """The step before the fault was saved, whole."""
    newest = cp.newest_valid(folder / name, lambda text: pytest.fail(text))
    assert newest is not None
    assert newest.name == f"checkpoint-{FAULT_STEP - 1}"


@pytest.fixture(scope="module")
def faults(
    oracles: Callable[[str], tuple[Any, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, list[float]]]]:
    """The folder of all cases, which run at once, and how each rank ended."""
    folder = tmp_path_factory.mktemp("faults")
    model = oracles("qwen3")[1]
    return folder, run(folder, [case_of(name, model, *values[:3]) for name, values in FAULTS.items()])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_all_ranks_stop_with_one_sentence_and_a_checkpoint(
    faults: tuple[Path, dict[str, dict[str, list[float]]]], name: str
) -> None:
    folder, ended = faults
    fault, rank, _, words = FAULTS[name]
    frozen = fault == "frozen"
    assert set(ended[name]) == {"0", "1"} - ({str(rank)} if frozen else set())
    codes = {int(r): int(code) for r, (code, _) in ended[name].items()}
    assert codes.get(rank) == {"killed": -9, "frozen": None, "stuck": 1, "hung": 1, "refused": 1}[fault]
    assert codes[1 - rank] == 1
    (sentence,) = said(folder, name)
    assert words in sentence
    if fault != "refused":
        assert "All 2 ranks stop; checkpoint-3 is whole: python train.py --resume-from-checkpoint" in sentence
    assert_loadable(folder, name)
    written = (folder / name / "checkpoint-3" / "manifest.json").stat().st_mtime
    assert all(at - written < 30 for _, at in ended[name].values())


@dataclass(frozen=True)
class Cable:
    """Two network namespaces with their own addresses, which stand for two boxes, and the link between them."""

    names: tuple[str, str]
    links: tuple[str, str]
    hosts: tuple[str, str] = ("10.77.0.1", "10.77.0.2")

    def set(self, state: str) -> None:
        """Pulls the cable (down) or puts it back (up)."""
        subprocess.run(["ip", "-n", self.names[1], "link", "set", self.links[1], state], check=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    assert os.geteuid() == 0, "the tests of two machines make network namespaces, which needs root"
    assert shutil.which("ip"), "the tests of two machines need iproute2: apt-get install iproute2"
    own = os.getpid()
    made = Cable((f"sparkA{own}", f"sparkB{own}"), (f"cA{own}", f"cB{own}"))

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in made.names:
            ip("netns", "add", name)
        ip("link", "add", made.links[0], "netns", made.names[0], "type", "veth",
           "peer", "name", made.links[1], "netns", made.names[1])
        for name, link, host in zip(made.names, made.links, made.hosts, strict=True):
            ip("-n", name, "addr", "add", f"{host}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for name in made.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.slow
def test_a_cut_between_two_machines_is_noticed_on_both(
    oracles: Callable[[str], tuple[Any, Path]], tmp_path: Path, cable: Cable
) -> None:
    case = {**case_of("cut", oracles("qwen3")[1], "cut", 1, "lora"), "namespaces": cable.names, "links": cable.links,
            "hosts": cable.hosts}
    ended = run(tmp_path, [case])["cut"]
    assert {int(code) for code, _ in ended.values()} == {1}
    assert len(ended) == 2
    here, there = ((tmp_path / f"cut-{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert len(here) == len(there) == 1  # each box has a screen of its own, and says it there
    assert "No sign of life for 15 s from rank 1 (process" in here[0]
    assert "Nothing was heard for 15 s from 10.77.0.1:29417" in there[0]
    assert_loadable(tmp_path, "cut")
    written = (tmp_path / "cut" / "checkpoint-3" / "manifest.json").stat().st_mtime
    assert all(at - written < 30 for _, at in ended.values())


def wait_until(holds: Callable[[], bool], processes: list[subprocess.Popen[bytes]], patience_s: float = 240) -> None:
    """Waits for a state, for as long as the processes live."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "one ended before that"
        time.sleep(0.1)


def meeting_place(rendezvous: str, cable: Cable, number: int) -> list[str]:
    """Returns torchrun's options for one of two machines: as `plan --as torchrun` writes them, or with c10d."""
    first, host = cable.hosts[0], cable.hosts[number]
    if rendezvous == "static":
        return ["--node-rank", str(number), "--master-addr", first, "--master-port", "29433"]
    return ["--rdzv-backend", "c10d", "--rdzv-id", "cut", "--rdzv-endpoint", f"{first}:29433", "--rdzv-conf",
            f"is_host={int(number == 0)}", "--local-addr", host]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_goes_on_from_the_checkpoint_when_the_cable_is_back(
    rendezvous: str, tmp_path: Path, cable: Cable
) -> None:
    """torchrun and train.py as a user starts them on two boxes, with a user's limits."""
    make_model(tmp_path / "tiny", vocab_size=512, dtype="float32")
    write_smoke(tmp_path / "train.jsonl")
    steps, record = 60, tmp_path / "results" / "cut" / "metrics.jsonl"
    logs = [tmp_path / "A.log", tmp_path / "B.log"]
    sentences = ("No sign of life for 20 s from rank 1", "Nothing was heard for 20 s from 10.77.0.1:")
    started: list[subprocess.Popen[bytes]] = []
    try:
        for i, (name, link) in enumerate(zip(cable.names, cable.links, strict=True)):
            with logs[i].open("wb") as log:
                started.append(subprocess.Popen(
                    ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                     "--nproc-per-node", "1", "--max-restarts", "2", *meeting_place(rendezvous, cable, i),
                     str(ROOT / "train.py"), "--engine", "native", "--mode", "lora",
                     "--model", str(tmp_path / "tiny"), "--train-data", str(tmp_path / "train.jsonl"),
                     "--max-steps", str(steps), "--num-epochs", "100", "--pack-length", "128",
                     "--gradient-accumulation", "4", "--save-steps", "2", "--dtype", "float32", "--device", "cpu",
                     "--no-tensorboard", "--eval-split", "0", "--name", "cut", "--results", str(tmp_path / "results")],
                    env={**os.environ, "GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                ))
        wait_until(lambda: record.is_file() and '"step": 6,' in record.read_text(), started)
        cable.set("down")
        pulled = time.monotonic()
        wait_until(lambda: all(s in log.read_text() for s, log in zip(sentences, logs, strict=True)), started)
        noticed = time.monotonic() - pulled
        cable.set("up")
        assert [process.wait(timeout=400) for process in started] == [0, 0], logs[0].read_text()[-3000:]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert noticed < 30
    said = logs[0].read_text()
    assert said.count("No sign of life") == 1
    saved = re.findall(r"Resuming from checkpoint-(\d+): step", said)
    assert len(saved) == 1
    assert int(saved[0]) >= 4
    done = [json.loads(line)["step"] for line in record.read_text().splitlines()]
    assert done == list(range(1, steps + 1)), "each step once: what the cut took is done again"
