"""Runs of two ranks in which something goes wrong; started by test_faults.py as a program of its own.

    python faults_worker.py SPEC.json

A process of its own keeps the store where the ranks of a case meet, as torchrun's agent does. Stores and ranks of every
case are forked at once, by a process without threads; nearly all of their time is waiting. What each rank said is in
WORK/CASE-RANK.txt, how it ended in WORK/ended.json.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks_worker import train

from sparktune.setup.plan.errors import SparktuneError
from sparktune.training.distributed import Members, RankLost, World, is_collective
from sparktune.training.heartbeat import Limits
from sparktune.training.loop import TrainingLoop

LIMITS = Limits(lost_s=15.0, stuck_s=15.0)
"""A user's are 20 s each."""
FAULT_STEP = 4
"""The first step whose length a rank can compare with one before it that compiled nothing."""
CLONE_NEWNET = 0x40000000


class NeverRead(torch.Tensor):
    """What a hung kernel or a sum that never ends would write: reading it waits for ever, asking for it does not."""

    def tolist(self) -> list[float]:
        time.sleep(600)
        raise AssertionError("the test is over before")


def faulty(case: dict[str, Any], rank: int) -> Callable[[TrainingLoop], None] | None:
    """Returns what `rank` does in the middle of step FAULT_STEP."""
    if rank != case["rank"]:
        return None
    if case["fault"] == "killed":
        return lambda loop: os.kill(os.getpid(), signal.SIGKILL)
    if case["fault"] == "frozen":
        return lambda loop: os.kill(os.getpid(), signal.SIGSTOP)
    if case["fault"] == "stuck":
        return lambda loop: time.sleep(600)
    if case["fault"] == "hung":  # passes and sums were asked for, and the device never gets to their end
        return lambda loop: setattr(loop.engine, "gradient_norm", lambda: torch.zeros(()).as_subclass(NeverRead))
    if case["fault"] == "cut":  # the cable between the two machines is pulled
        cut = ["ip", "-n", case["namespaces"][rank], "link", "set", case["links"][rank], "down"]
        return lambda loop: subprocess.run(cut, check=True) and None
    if case["fault"] == "refused":
        def refuse(loop: TrainingLoop) -> None:
            raise SparktuneError("The disk of rank 1 said no.")

        return refuse
    raise ValueError(case["fault"])


def rank_main(case: dict[str, Any], rank: int, port: int, work: Path) -> int:
    """One rank, as a session handles what its world tells it. Returns its exit code."""
    if case["fault"] == "cut":
        with open(f"/run/netns/{case['namespaces'][rank]}") as there:
            assert ctypes.CDLL(None, use_errno=True).setns(there.fileno(), CLONE_NEWNET) == 0
    said = (work / f"{case['name']}-{rank}.txt").open("a")

    def tell(text: str, aloud: bool) -> None:
        if aloud:
            said.write(text + "\n")
            said.flush()

    host = case["hosts"][0] if case["fault"] == "cut" else "127.0.0.1"
    interface = case["links"][rank] if case["fault"] == "cut" else "lo"
    os.environ.update({
        "MASTER_ADDR": host, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": interface,
        "TORCHELASTIC_USE_AGENT_STORE": str(case["fault"] != "cut"),
    })
    torch.set_num_threads(1)
    world = World(members=Members(rank=rank, size=2, local_rank=rank, local_size=2, host=host, port=port),
                  tell=tell, limits=LIMITS)
    fault, step = faulty(case, rank), TrainingLoop.step

    def stumbling(loop: TrainingLoop) -> None:
        if loop.state.step == FAULT_STEP - 1 and fault is not None:
            passes = loop.engine.forward_backward

            def stumble(*given: Any) -> Any:
                fault(loop)
                return passes(*given)

            loop.engine.forward_backward = stumble
        step(loop)

    TrainingLoop.step = stumbling
    try:
        world.join()
        train(case, work, case["name"], world)
        world.leave()
        return 0
    except SparktuneError as error:
        if isinstance(error, RankLost):
            world.wait_for_verdict()
        tell(str(error), world.fails(str(error), int(error.exit_code)))
        return int(error.exit_code)
    except RuntimeError as error:
        if is_collective(error):
            world.wait_for_verdict()
        tell(f"unexplained: {error}", world.fails(str(error), 1))
        return 1


def keeper(port: int) -> int:
    """Forks the process that keeps a store at `port`; it stays until it is killed."""
    child = os.fork()
    if not child:
        try:
            kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            while kept is not None:
                time.sleep(60)
        finally:
            os._exit(99)
    return child


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main(spec: dict[str, Any]) -> None:
    work = Path(spec["work"])
    keepers, children = [], {}
    for case in spec["cases"]:
        if case["fault"] == "cut":
            port = 29417  # rank 0 keeps the store: it lies inside a namespace
        else:
            port = free_port()
            keepers.append(keeper(port))
        for rank in (0, 1):
            child = os.fork()
            if not child:
                try:
                    os._exit(rank_main(case, rank, port, work))
                except BaseException:
                    traceback.print_exc()
                    os._exit(99)
            children[child] = (case["name"], rank)
    begun = time.monotonic()
    ended: dict[str, dict[int, tuple[int, float]]] = {case["name"]: {} for case in spec["cases"]}
    lost: dict[int, int] = {}
    frozen: list[int] = []
    while children and time.monotonic() - begun < spec["patience_s"]:
        child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if os.WIFSTOPPED(status):
            frozen.append(child)
            children.pop(child)
        elif child in keepers:
            lost[child] = status
        elif child:
            name, rank = children.pop(child)
            ended[name][rank] = (os.waitstatus_to_exitcode(status), time.time())
        else:
            time.sleep(0.05)
    for child in [*children, *frozen, *(k for k in keepers if k not in lost)]:
        os.kill(child, signal.SIGKILL)  # frozen ones among them: torchrun's agent ends them the same way
        os.waitpid(child, 0)
    (work / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
