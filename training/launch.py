"""`train.py --gpus N`: the same command as N ranks on this machine, started by torchrun's own agent.

With `--node I/COUNT@ADDRESS:PORT` this is machine I of several: the ranks of machine 0, whose address that is, come
first, and it keeps the store where all meet.

What it adds to `torchrun --standalone --nproc-per-node N train.py ...`: the exit code is the ranks' own (torchrun's is
always 1), Ctrl-C reaches every rank once and gives them the time that a step and a checkpoint need, and torchrun's
table of failed processes does not hide the one sentence that says what happened.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sparktune.setup.plan.config import load_plan, read_config, resolve
from sparktune.setup.plan.errors import PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.links import address_of, interface_to

__all__ = ["Node", "gpus_of_command", "launch", "name_interfaces"]

_GRACE_S = 600
"""For ranks that are told to stop: the step in progress, and a checkpoint. Where torch's agent gives 30 s of its own
from the first rank's end, that is enough too: ranks that stop together end together, when the checkpoint is whole."""
_MEET_S = 600
"""For the agents of several machines to find each other: one may still be looking at its model's files."""
_NODE = re.compile(r"(\d+)/(\d+)@([A-Za-z0-9][A-Za-z0-9.-]*):(\d{1,5})")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of several."""

    index: int
    count: int
    host: str
    """Of machine 0, on the link between them."""
    port: int

    @classmethod
    def of(cls, text: str) -> Node:
        """Reads `I/COUNT@ADDRESS:PORT`.

        Raises:
            UsageError: it is something else.
        """
        match = _NODE.fullmatch(text)
        if match is None or not int(match[1]) < int(match[2]) or not 0 < int(match[4]) < 2**16:
            raise UsageError(
                f"--node should say which machine of how many this is, and where machine 0 is, such as "
                f"1/2@192.168.100.1:29500; it is {text}."
            )
        return cls(index=int(match[1]), count=int(match[2]), host=match[3], port=int(match[4]))


def name_interfaces(host: str, env: dict[str, str] | os._Environ[str]) -> str:
    """Tells gloo and NCCL which interface leads to machine 0, unless somebody has; returns its name.

    Both would take the first that is up, which is not the cable. The loopback interface is named only where its address
    itself was given: machine 0's own name leads there too (Debian's /etc/hosts), and no other machine comes in by it.

    Raises:
        PreflightError: no interface leads there that other machines could reach.
    """
    first = address_of(host)
    every = [str(found[4][0]) for found in socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)]
    names = [name for address in (first, *every) if (name := interface_to(address)) is not None]
    name = next((name for name in names if name != "lo" or host == first), None)
    if name is None:
        where = "only this machine's loopback interface leads" if names else "no network interface leads"
        raise PreflightError(
            f"{host}, where the machines should meet: {where} there. Give its address on the link between them, or "
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; see `ip route`."
        )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        env.setdefault(variable, name)
    return name


def gpus_of_command(flags: Mapping[str, Any], config: Path | None, env: Mapping[str, str]) -> int:
    """Returns how many ranks a command line asks this process to start; 1 where it trains itself.

    Args:
        flags: plan fields given on the command line.
        config: what --config names.
        env: the environment; a process that torchrun started is a rank and starts none.
    """
    if "WORLD_SIZE" in env:
        return 1
    resume = flags.get("resume_from_checkpoint")
    try:
        own = config
        if resume:
            root = Path(resume).resolve()
            own = next((p for p in (root / "plan.yaml", root.parent / "plan.yaml") if p.is_file()), None)
        if own is not None and own.name == "plan.yaml" and own.is_file():
            return int(flags.get("gpus", load_plan(own).gpus))
        return resolve(dict(flags), read_config(config) if config else {}, env, {}).gpus
    except SparktuneError:
        return 1  # the session reads the same files and says what is wrong with them


class _Passed:
    """Passes every signal of this process on to the ranks, which are its children."""

    def __init__(self) -> None:
        self.before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        for child in Path("/proc/self/task", str(os.getpid()), "children").read_text(encoding="ascii").split():
            os.kill(int(child), number)

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _config(gpus: int, node: Node | None) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    if node is None:
        meeting: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0",
                                   "run_id": f"sparktune-{os.getpid()}"}
    else:
        name_interfaces(node.host, os.environ)
        # static: machine 0 has the run's folder, so rank 0 must be there; c10d gives ranks as machines come
        meeting = {"rdzv_backend": "static", "rdzv_endpoint": f"{node.host}:{node.port}", "run_id": "sparktune",
                   "rdzv_configs": {"rank": node.index, "timeout": _MEET_S}}
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:  # the image's torch 2.11 gives 30 s
        meeting["shutdown_timeout"] = _GRACE_S
    count = 1 if node is None else node.count
    return LaunchConfig(
        min_nodes=count, max_nodes=count, nproc_per_node=gpus, max_restarts=0, logs_specs=DefaultLogsSpecs(),
        signals_to_handle="SIGQUIT",  # the others are passed on, once, by us
        **meeting,
    )


def launch(gpus: int, script: Path, words: Sequence[str], node: Node | None = None) -> int:
    """Runs `python SCRIPT WORDS` as `gpus` ranks and returns the exit code of the first that failed, or 0.

    Args:
        gpus: ranks to start here.
        script: train.py.
        words: its command line.
        node: this machine's place among several; None where it trains alone.

    Raises:
        PreflightError: no interface leads to machine 0.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # The ranks say what went wrong; the agent's lines about it would come after and say less.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Each rank's own threads; torchrun says 1 unless told otherwise, which starves the CPU side of several ranks less.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // gpus)))
    passed = _Passed()
    try:
        elastic_launch(_config(gpus, node), sys.executable)("-u", str(script), *words)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    finally:
        passed.restore()
    return 0
