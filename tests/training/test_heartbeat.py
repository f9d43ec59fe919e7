"""The watchdog's judgement, with a store and a clock of the test's own; whole runs are in model/test_faults.py."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from sparktune.training.heartbeat import Limits, Watchdog

PULSE, LOST = 0.05, 0.6


class Memory:
    """A store of one process; it can stop answering, as over a cable that was pulled."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.silent = False

    def _answer(self) -> None:
        if self.silent:
            raise RuntimeError("timed out")

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._answer()
        return [self.values[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._answer()
        if self.values.get(key, b"").decode() == expected:
            self.values[key] = desired.encode()
        return self.values[key]


class Rank:
    """Rank 0 of two, watched; the test plays rank 1."""

    def __init__(self) -> None:
        self.store = Memory()
        self.store.set("pulse/1", "0")
        self.said: list[tuple[str, bool]] = []
        self.left = threading.Event()
        self.code: int | None = None
        self.asked = 0

        def leave(code: int) -> None:
            self.code = code
            self.left.set()

        def connect() -> Memory:
            self.asked += 1
            return self.store

        self.dog = Watchdog(
            rank=0, who=["process 1 on a", "process 2 on b"], connect=connect, home="a:29500",
            tell=lambda text, aloud: self.said.append((text, aloud)),
            limits=Limits(pulse_s=PULSE, lost_s=LOST, stuck_s=LOST), leave=leave,
        )
        self.dog.first_pulse()
        self.dog.start()

    def other_lives(self, until: Callable[[], bool]) -> None:
        """Gives rank 1's signs of life until something holds."""
        number, deadline = 1, time.monotonic() + 30
        while not until():
            assert time.monotonic() < deadline
            number += 1
            if not self.store.silent:
                self.store.set("pulse/1", str(number))
            time.sleep(PULSE / 2)


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_a_silent_rank_is_named_and_ends_this_one(rank: Rank) -> None:
    rank.dog.advice = "checkpoint-7 is whole"
    assert rank.left.wait(30)
    assert rank.code == 1
    ((text, aloud),) = rank.said
    assert text.startswith("No sign of life for 1 s from rank 1 (process 2 on b)")
    assert text.endswith("All 2 ranks stop; checkpoint-7 is whole.")
    assert aloud
    assert json.loads(rank.store.values["failed"])["rank"] == 0


def test_a_store_out_of_reach_is_told_from_a_silent_rank_and_nobody_is_asked(rank: Rank) -> None:
    began = time.monotonic()
    rank.other_lives(lambda: time.monotonic() - began > 2 * PULSE)
    rank.store.silent, asked = True, rank.asked
    assert rank.left.wait(30)
    ((text, aloud),) = rank.said
    assert text.startswith("Nothing was heard for 1 s from a:29500")
    assert aloud
    assert rank.asked == asked, "a connection that will not be made costs ten seconds"


def test_what_another_rank_has_said_is_not_said_again(rank: Rank) -> None:
    rank.store.set("failed", json.dumps({"rank": 1, "text": "The disk is full.", "code": 3}))
    rank.other_lives(rank.left.is_set)
    assert rank.said == [("The disk is full.", False)]
    assert rank.code == 3


def test_a_rank_that_stays_in_a_step_is_stuck(rank: Rank) -> None:
    rank.dog.enter("step 9", slowest_s=0.01)
    with rank.dog.waiting():
        pass
    rank.other_lives(rank.left.is_set)
    assert "Rank 0 (process 1 on a) is stuck in step 9" in rank.said[0][0]


def test_waiting_in_a_step_has_an_end_that_blames_nobody(rank: Rank) -> None:
    rank.dog.advice = "checkpoint-7 is whole"
    rank.dog.enter("step 9", slowest_s=0.01)
    with rank.dog.waiting():
        rank.other_lives(rank.left.is_set)
    ((text, _),) = rank.said
    assert text.startswith("No rank finished step 9 in 1 s, though all give signs of life: ")
    assert text.endswith("All 2 ranks stop; checkpoint-7 is whole.")
    assert rank.code == 1


def test_time_spent_waiting_is_not_the_ranks_own(rank: Rank) -> None:
    rank.dog.enter("step 9", slowest_s=0.01)
    with rank.dog.waiting():
        began = time.monotonic()
        rank.other_lives(lambda: time.monotonic() - began > LOST / 2)
    rank.other_lives(rank.left.is_set)
    assert "No rank finished step 9" in rank.said[0][0]


def test_who_may_wait_for_others_anywhere_in_a_step_is_not_named(rank: Rank) -> None:
    rank.dog.enter("step 9", slowest_s=0.01, apart=False)
    rank.other_lives(rank.left.is_set)
    assert "No rank finished step 9" in rank.said[0][0]


def test_what_has_no_limit_has_none_while_it_waits(rank: Rank) -> None:
    rank.dog.enter("what follows step 9")
    with rank.dog.waiting():
        began = time.monotonic()
        rank.other_lives(lambda: time.monotonic() - began > 3 * LOST)
    assert not rank.said
    rank.dog.stop()


def test_the_time_in_which_another_rank_was_silent_is_given_back(rank: Rank) -> None:
    began = time.monotonic()
    rank.other_lives(lambda: time.monotonic() - began > 2 * PULSE)
    began = time.monotonic()
    rank.dog.enter("step 9", slowest_s=0.01)
    time.sleep(0.8 * LOST)
    rank.other_lives(rank.left.is_set)
    assert "is stuck in step 9" in rank.said[0][0]
    assert time.monotonic() - began > 1.3 * LOST


def test_who_waits_for_a_silent_rank_inside_a_pass_is_not_stuck(rank: Rank) -> None:
    rank.dog.enter("step 9", slowest_s=0.01)
    rank.dog._phase = replace(rank.dog._phase, own_until=time.monotonic() + LOST / 2)  # before the silence lasts enough
    assert rank.left.wait(30)
    assert "No sign of life" in rank.said[0][0]


def test_a_rank_that_is_through_is_not_missed(rank: Rank) -> None:
    rank.store.set("pulse/1", "done")
    assert not rank.left.wait(3 * LOST)
    rank.dog.stop()
