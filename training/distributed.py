"""The ranks of one run: who they are, how they meet, and the few collectives that the loop and the engine need.

Started by torchrun (or by whatever sets the same variables); everything below is torch.distributed: NCCL between GPUs,
gloo between CPUs and for the loop's own small numbers. A process that was started alone is a world of one rank, and
every method does then what it says without talking to anybody.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sparktune.setup.plan.errors import PreflightError, SparktuneError, UsageError
from sparktune.setup.plan.scale import BUCKET_BYTES
from sparktune.training.heartbeat import Limits, Watchdog
from sparktune.training.launch import name_interfaces

__all__ = ["Members", "RankLost", "World", "is_collective"]

_MEET_S = 120.0
"""To wait for the other ranks at the start; torchrun has gathered their agents before."""
_COLLECTIVE_S = 24 * 3600.0
"""To wait in a collective. Inside steps the watchdog ends a wait that is not honest; outside them only one for a rank
that has fallen silent."""
_LEAD_FIRST_S = 1.0


class RankLost(SparktuneError):
    """A collective failed because another rank is gone. The watchdog finds out which and why."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """This rank's place among all of them, from torchrun's environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restart: int = 0
    """How often torchrun has started the ranks anew."""
    host: str = "127.0.0.1"
    port: int = 0
    """Of the store where the ranks meet."""

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Members:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; alone without WORLD_SIZE.

        Raises:
            UsageError: some of them are missing, or no numbers that fit together.
        """
        if "WORLD_SIZE" not in env:
            return cls()
        try:
            size, rank = int(env["WORLD_SIZE"]), int(env["RANK"])
            found = cls(
                rank=rank, size=size, local_rank=int(env["LOCAL_RANK"]),
                local_size=int(env.get("LOCAL_WORLD_SIZE", size)),
                restart=int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
                host=env.get("MASTER_ADDR", "127.0.0.1") if size == 1 else env["MASTER_ADDR"],
                port=int(env.get("MASTER_PORT", 0)) if size == 1 else int(env["MASTER_PORT"]),
            )
        except (KeyError, ValueError) as error:
            raise UsageError(
                "WORLD_SIZE is set, so RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT should be too, as torchrun sets "
                f"them; seen: {error}. Start with torchrun, or unset WORLD_SIZE."
            ) from error
        if not (0 <= found.rank < found.size and 0 <= found.local_rank < found.local_size <= found.size):
            raise UsageError(
                f"RANK {found.rank} of WORLD_SIZE {found.size} and LOCAL_RANK {found.local_rank} of LOCAL_WORLD_SIZE "
                f"{found.local_size} do not fit together. Start with torchrun, or unset WORLD_SIZE."
            )
        return found


@dataclass(kw_only=True)
class World:
    """All ranks of a run, seen from this one."""

    members: Members = field(default_factory=Members)
    tell: Callable[[str, bool], None] = lambda text, aloud: None
    """Takes the sentence for the user when the run ends because of another rank (Watchdog's `tell`)."""
    limits: Limits = field(default_factory=Limits)
    sent_bytes: int = 0
    """Bytes that this rank put on the link for gradients, as a ring sends them: 2 (n - 1) / n of what is summed."""
    network: str = ""
    """One sentence: by which interface this rank meets those of other machines; empty where there are none."""
    _dog: Watchdog | None = None

    @property
    def rank(self) -> int:
        """This rank."""
        return self.members.rank

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.members.size

    @property
    def leads(self) -> bool:
        """This rank alone writes files and speaks."""
        return self.members.rank == 0

    @property
    def alone(self) -> bool:
        """There is no other rank."""
        return self.members.size == 1

    # -- meeting and parting

    def join(self) -> None:
        """Meets the other ranks; returns when all are there. NCCL's own connections are made when first needed.

        Raises:
            PreflightError: they did not come.
        """
        if self.alone:
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if self.size > self.members.local_size:
            self.network = _network(self.members.host)
        try:
            dist.init_process_group(
                backend, timeout=timedelta(seconds=_MEET_S), rank=self.rank, world_size=self.size
            )
            names = self._all_say(f"process {os.getpid()} on {socket.gethostname()}")
        except (RuntimeError, ValueError) as error:
            raise PreflightError(
                f"Rank {self.rank} should meet {self.size - 1} others at {self.members.host}:{self.members.port}; it "
                f"did not: {_first_line(error)}. Look at the other ranks' messages, at the address, and on several "
                "machines at GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, which should name the interface between them. "
                f"{self.network}".rstrip()
            ) from error
        # No public name yet; without it a long wait for rank 0 (tokenising, writing) would end the run.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=_COLLECTIVE_S))
        self._dog = Watchdog(
            rank=self.rank, who=names, connect=self._connect, home=f"{self.members.host}:{self.members.port}",
            tell=self.tell, limits=self.limits,
        )
        self._dog.first_pulse()
        self.meet()
        self._dog.start()

    def _connect(self, prefix: str | None = None) -> Any:
        """Opens a connection of its own to the store that torchrun's agent (or rank 0) keeps."""
        store = dist.TCPStore(
            self.members.host, self.members.port, is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=self.limits.lost_s / 2),
        )
        return dist.PrefixStore(prefix or f"sparktune/{self.members.restart}", store)

    def _all_say(self, text: str) -> list[str]:
        """Every rank's text, in order; as bytes, so that nothing is unpickled."""
        own = torch.zeros(256, dtype=torch.uint8)
        encoded = text.encode()[:256]
        own[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        every = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return [bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in every]

    def leave(self) -> None:
        """Parts from the others when all are through; after a failure it is not called."""
        if self._dog is None:
            return
        self.meet()
        self._dog.stop()
        self._dog = None
        dist.destroy_process_group()

    def fails(self, text: str, code: int) -> bool:
        """This rank ends with an error. Returns whether it is the one to say so: the first to fail, rank 0 before all.

        Most errors happen on all ranks at once, and rank 0 alone writes events; the others leave it a second. If the
        ranks have not met, whatever is wrong is wrong everywhere.
        """
        if self._dog is None:
            return self.leads
        if not self.leads:
            time.sleep(_LEAD_FIRST_S)
        return self._dog.claim(text, code)

    def remember(self, text: str) -> None:
        """Keeps a line where the ranks meet, for those that torchrun starts in place of these."""
        if not self.alone:
            self._connect(prefix="sparktune").set("remembered", text)

    def recall(self) -> str | None:
        """Returns what the ranks before these remembered; None where torchrun has not restarted any."""
        if self.alone or not self.members.restart:
            return None
        store = self._connect(prefix="sparktune")
        return store.get("remembered").decode() if store.check(["remembered"]) else None

    def wait_for_verdict(self) -> None:
        """After RankLost: gives the watchdog the time to say which rank and to end this process."""
        if self._dog is not None:
            self._dog.wait_for_verdict()

    # -- what the watchdog is told

    def enter(self, what: str, slowest_s: float | None = None, *, apart: bool = True) -> None:
        """The main thread begins something (Watchdog.enter)."""
        if self._dog is not None:
            self._dog.enter(what, slowest_s, apart=apart)

    def advise(self, text: str) -> None:
        """Sets what the user is told to do if a rank is lost from here on."""
        if self._dog is not None:
            self._dog.advice = text

    def waiting(self) -> AbstractContextManager[None]:
        """The main thread waits for what needs the other ranks: one of them that is late is not this one's fault.

        Inside a step that has a limit (`enter`), all ranks together still have one.
        """
        return self._dog.waiting() if self._dog is not None else nullcontext()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A collective: its failure means that another rank is gone.

        Raises:
            RankLost: it failed.
        """
        with self.waiting():
            try:
                yield
            except RuntimeError as error:
                raise RankLost(f"A rank was lost: {_first_line(error)}.") from error

    # -- collectives

    def meet(self) -> None:
        """Returns when every rank is here."""
        if not self.alone:
            with self.together():
                dist.all_reduce(torch.zeros(1))

    def sums(self, values: Sequence[float]) -> list[float]:
        """Returns the sums over all ranks, in float64."""
        if self.alone:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        with self.together():
            dist.all_reduce(total)
        return [float(value) for value in total]

    def sum_on_device(self, value: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a tensor over all ranks, on its device, without waiting for it there."""
        if not self.alone:
            with self.together():
                dist.all_reduce(value)
        return value

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the elementwise largest over all ranks, on the CPU."""
        values = values.to("cpu", copy=True)
        if not self.alone:
            with self.together():
                dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """Says whether it is true on any rank."""
        return flag if self.alone else self.sums([float(flag)])[0] > 0

    def hear(self, text: str | None) -> str:
        """Returns what rank 0 says; the others' argument is not looked at."""
        if self.alone:
            assert text is not None, "rank 0 speaks"
            return text
        encoded = torch.frombuffer(bytearray((text or "").encode()), dtype=torch.uint8) if text else None
        length = torch.tensor([0 if encoded is None else len(encoded)])
        with self.together():
            dist.broadcast(length, 0)
            said = encoded if self.leads and encoded is not None else torch.zeros(int(length), dtype=torch.uint8)
            if len(said):
                dist.broadcast(said, 0)
        return bytes(said.numpy()).decode()

    def hear_tensor(self, tensor: torch.Tensor) -> None:
        """Overwrites `tensor` (contiguous, on the CPU) by rank 0's."""
        if not self.alone and tensor.numel():
            with self.together():
                dist.broadcast(tensor.view(-1).view(torch.uint8), 0)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces every tensor by its sum over all ranks: one collective for every 64 MiB of the same type."""
        if self.alone:
            return
        bucket: list[torch.Tensor] = []
        size = 0
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
            following = tensors[i + 1] if i + 1 < len(tensors) else None
            if following is None or size >= BUCKET_BYTES or following.dtype != tensor.dtype:
                self._add_bucket(bucket)
                self.sent_bytes += 2 * (self.size - 1) * size // self.size
                bucket, size = [], 0

    def _add_bucket(self, bucket: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        with self.together():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(list(bucket), [p.view_as(t) for p, t in zip(parts, bucket, strict=True)])

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Runs the block on rank 0 first, then on each machine's first rank, then on the others: what the first one
        prepares on a disk, the next ones find."""
        turn = 0 if self.leads else 1 if self.members.local_rank == 0 else 2
        for _ in range(turn):
            self.meet()
        yield
        for _ in range(2 - turn):
            self.meet()


def is_collective(error: BaseException) -> bool:
    """Says whether an error of torch comes from a collective that autograd or FSDP started, so from a lost rank."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "closed by peer"))
    )


def _network(host: str) -> str:
    """Names the interfaces where nobody has, and says which they are."""
    why = ""
    try:
        name_interfaces(host, os.environ)
    except PreflightError as error:  # or a name that only the cluster's own software resolves: it has set these
        why = str(error)
    named = [f"{v}={os.environ[v]}" for v in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if os.environ.get(v)]
    if len(named) == 2:
        return f"Between the machines: {', '.join(named)}."
    left = "gloo and NCCL choose" if not named else f"{named[0]}, and the other of gloo and NCCL chooses"
    return f"Between the machines: {left} an interface for want of a name. {why}"


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
