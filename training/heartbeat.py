"""Notices within seconds that a rank is gone, stuck, or out of reach, and ends this one with the reason.

A collective waits for every rank. When one is killed, stopped, or cut off, the others would wait for as long as the
collective's timeout, which must outlast the longest honest wait (a corpus being tokenised, a checkpoint being
written). So every rank also says "I am here" once a second in the store that torchrun's rendezvous keeps, from a thread
of its own, and a second thread looks at the clock. Nothing of torch gives that for gloo, and for NCCL not in seconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

__all__ = ["Limits", "Store", "Watchdog"]

_FAILED = "failed"
_DONE = "done"
_HEARS = 3
"""Pulses within which a rank that is in contact with the store has heard from it."""
_NAMED_FIRST = 5
"""Pulses that a rank which is late by itself has for saying so, before those that wait say that nobody can be named."""
_Turn = Literal["alone", "first", "another"]
"""Who tells the user: this rank, for it reaches nobody; whichever is the first to; another rank has."""


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None:
        """Writes."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Reads several keys; waits for those that are not there yet."""

    def check(self, keys: list[str]) -> bool:
        """Says whether all keys are there."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Writes `desired` where the key holds `expected`, or where it does not exist and `expected` is empty."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long what may take."""

    pulse_s: float = 1.0
    """Between two signs of life."""
    lost_s: float = 20.0
    """Without a sign of life: the rank, its machine or the network is gone. On a machine with eight processes for every
    core, honest ranks were silent for 10 s."""
    stuck_s: float = 20.0
    """Least time that a rank may compute before it meets the others; three times its slowest step if that is more. All
    together have five pulses longer: whoever waits for them, or for a device, cannot say whose fault it is."""


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """What the main thread does; times are of the watchdog's own clock."""

    what: str
    own_until: float | None = None
    """Until when this rank may compute; None: for as long as it likes, or it waits."""
    all_until: float | None = None
    """Until when all ranks must be through, this one's waiting included; None: no limit."""
    all_s: float = 0.0
    """How long that was."""


class Watchdog:
    """The two threads of one rank. Everything public is called from the main thread.

    Args:
        rank: this one.
        who: for each rank where it runs, in words: "process 4711 on box-b".
        connect: opens a connection to the store for the pulse alone: the group's own is busy while it waits.
        home: where that store is, in words.
        tell: takes the sentence for the user, and whether this rank is the one to say it aloud; called from a thread,
            just before this process ends.
        limits: how long what may take.
        leave: ends this process at once with an exit code; os._exit, because the main thread may wait for ever.
    """

    def __init__(
        self, *, rank: int, who: list[str], connect: Callable[[], Store], home: str, tell: Callable[[str, bool], None],
        limits: Limits, leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.advice = "there is no checkpoint yet"
        """What the user has after a failure; the loop renews it."""
        self._rank, self._who, self._connect, self._home = rank, who, connect, home
        self._tell, self._limits, self._leave = tell, limits, leave
        self._ended = threading.Event()
        now = time.monotonic()
        self._contact = now
        self._seen: dict[int, tuple[bytes, float]] = {r: (b"", now) for r in range(len(who)) if r != rank}
        self._excused_s = 0.0
        """How long this process, or another rank, was kept from running; the watching thread alone writes it."""
        self._phase = _Phase(what="beginning")
        self._failure: dict[str, Any] | None = None
        """What another rank has said."""
        self._spoke = threading.Lock()
        self._store: Store | None = None
        self._threads = [threading.Thread(target=f, name=f.__name__, daemon=True) for f in (self._pulse, self._watch)]

    def start(self) -> None:
        """Starts both threads; every rank must have called `first_pulse` before."""
        for thread in self._threads:
            thread.start()

    def first_pulse(self) -> None:
        """Connects and gives the first sign of life."""
        self._store = self._connect()
        self._store.set(f"pulse/{self._rank}", "0")

    def stop(self) -> None:
        """Stops watching: this rank is through with the others."""
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=2 * self._limits.pulse_s)

    # -- what the main thread says

    def enter(self, what: str, slowest_s: float | None = None, *, apart: bool = True) -> None:
        """The main thread begins something.

        Args:
            what: in words, for a message: "step 7".
            slowest_s: how long the longest of its kind has taken so far; None: it may take as long as it likes.
            apart: outside `waiting` it needs no other rank, so one that is late there is late by itself.
        """
        if slowest_s is None:
            self._phase = _Phase(what=what)
            return
        now, own_s = self._clock(), max(self._limits.stuck_s, 3 * slowest_s)
        all_s = own_s + _NAMED_FIRST * self._limits.pulse_s
        self._phase = _Phase(what=what, own_until=now + own_s if apart else None, all_until=now + all_s, all_s=all_s)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The main thread waits for other ranks, or for a device that may: its own time stands still, that of all does
        not."""
        before, began = self._phase, self._clock()
        self._phase = replace(before, own_until=None)
        yield
        if before.own_until is not None:
            self._phase = replace(before, own_until=before.own_until + self._clock() - began)

    def claim(self, text: str, code: int) -> bool:
        """Takes the word for all ranks; returns whether this rank is the first to fail, and so the one that speaks."""
        if not self._spoke.acquire(blocking=False):
            return False
        word = json.dumps({"rank": self._rank, "text": text, "code": code})
        try:
            store = self._connect()
            return bool(store.compare_set(_FAILED, "", word).decode() == word)
        except RuntimeError:  # no store, nobody to take turns with
            return True

    def wait_for_verdict(self) -> None:
        """A collective failed: stays until the threads know why and end the process, and no longer than they need."""
        self._phase = _Phase(what=self._phase.what)
        time.sleep(self._limits.lost_s + 3 * self._limits.pulse_s)

    # -- the threads

    def _pulse(self) -> None:
        store, number = self._store, 0
        assert store is not None, "first_pulse comes first"
        others = [f"pulse/{rank}" for rank in self._seen]
        while not self._ended.wait(self._limits.pulse_s):
            try:
                number += 1
                store.set(f"pulse/{self._rank}", str(number))
                values = store.multi_get(others)
                failed = json.loads(store.multi_get([_FAILED])[0]) if store.check([_FAILED]) else {}
            except RuntimeError:  # torch's store errors are RuntimeErrors; contact simply grows old
                continue
            now = time.monotonic()
            self._contact = now
            for rank, value in zip(self._seen, values, strict=True):
                if value != self._seen[rank][0]:
                    self._seen[rank] = (value, now)
            if failed.get("rank", self._rank) != self._rank:
                self._failure = failed
        try:
            store.set(f"pulse/{self._rank}", _DONE)
        except RuntimeError:
            return  # the store went first; nobody is left to read this

    def _watch(self) -> None:
        period = self._limits.pulse_s / 4
        last = time.monotonic()
        while not self._ended.wait(period):
            now = time.monotonic()
            slept, last = now - last - period, now
            if slept > self._limits.pulse_s:  # this process was kept from running: it heard nobody, and cannot judge
                self._forgive(slept)
            elif self._silent(now):
                self._excused_s += slept + period
            found = self._verdict(now)
            if found is not None:
                text, code, turn = found
                self._tell(text, turn == "alone" or (turn == "first" and self.claim(text, code)))
                if not self._ended.is_set():
                    self._leave(code)
                return

    def _forgive(self, seconds: float) -> None:
        self._contact += seconds
        self._seen = {rank: (value, at + seconds) for rank, (value, at) in self._seen.items()}
        self._excused_s += seconds

    def _clock(self) -> float:
        """Stands still while this process or another rank is kept from running: that is no step's own slowness."""
        return time.monotonic() - self._excused_s

    def _silent(self, now: float) -> bool:
        """Says whether another rank has given no sign of life lately, for which it may yet turn out to be lost."""
        return any(now - at > _HEARS * self._limits.pulse_s and value != _DONE.encode()
                   for value, at in self._seen.values())

    def _verdict(self, now: float) -> tuple[str, int, _Turn] | None:
        """Returns (sentence, exit code, who says it), or None while all is well."""
        if self._failure is not None:
            return str(self._failure["text"]), int(self._failure["code"]), "another"
        lost = self._limits.lost_s
        if now - self._contact > lost:
            return self._sentence(
                f"Nothing was heard for {lost:.0f} s from {self._home}, where the ranks meet: that machine or the "
                "network to it is gone, or torchrun ended there"
            ), 1, "alone"
        gone = [r for r, (value, at) in self._seen.items() if now - at > lost and value != _DONE.encode()]
        # who has heard nothing at all lately cannot tell a silent rank from a silent store
        if gone and now - self._contact < _HEARS * self._limits.pulse_s:
            named = "; ".join(f"rank {r} ({self._who[r]})" for r in gone)
            return self._sentence(
                f"No sign of life for {lost:.0f} s from {named}: killed, frozen, or cut off from the network"
            ), 1, "first"
        return None if self._silent(now) else self._late(self._phase, now - self._excused_s)

    def _late(self, phase: _Phase, clock: float) -> tuple[str, int, _Turn] | None:
        if phase.own_until is not None and clock > phase.own_until:
            return self._sentence(
                f"Rank {self._rank} ({self._who[self._rank]}) is stuck in {phase.what}: it has been there for longer "
                f"than {self._limits.stuck_s:.0f} s and three of its slowest steps, and the others wait for it"
            ), 1, "first"
        if phase.all_until is not None and clock > phase.all_until:
            return self._sentence(
                f"No rank finished {phase.what} in {phase.all_s:.0f} s, though all give signs of life: a kernel hangs "
                "on a GPU, or a sum over the ranks does not end; on which rank is not to be told from here (a GPU's "
                "own errors are the Xid lines of its machine's `dmesg`)"
            ), 1, "first"
        return None

    def _sentence(self, what: str) -> str:
        return f"{what}. All {len(self._who)} ranks stop; {self.advice}."
