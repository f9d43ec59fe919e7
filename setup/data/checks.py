"""What is said about rows beside their tokens: exact duplicates, leakage into the held-out part, turns, thinking."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sparktune.setup.data.read import Row

__all__ = ["RowFacts", "RowTally", "facts_of"]


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """Facts about one row."""

    multi_turn: bool
    """More than one assistant turn."""
    system: bool
    """A system message that says something."""
    thinking: bool
    """An assistant turn with reasoning."""


def facts_of(row: Row) -> RowFacts:
    """Returns the facts of one row."""
    messages = row.messages or []
    assistants = [m for m in messages if m["role"] == "assistant"]
    return RowFacts(
        multi_turn=len(assistants) > 1,
        system=any(m["role"] == "system" and m["content"].strip() for m in messages),
        thinking=any((m.get("reasoning_content") or "").strip() or _thinks(m["content"]) for m in assistants),
    )


def _thinks(content: str) -> bool:
    """Whether content holds a think block that is not empty; the opening tag may be missing (it was in the prompt)."""
    thought, closed, _ = content.partition("</think>")
    return bool(closed and thought.rpartition("<think>")[2].strip())


@dataclass(kw_only=True)
class RowTally:
    """Facts summed over the examples that are kept."""

    formats: Counter[str] = field(default_factory=Counter)
    multi_turn: int = 0
    with_system: int = 0
    with_thinking: int = 0
    _train: Counter[bytes] = field(default_factory=Counter)
    _eval: Counter[bytes] = field(default_factory=Counter)

    def add(self, row: Row, facts: RowFacts, digest: bytes, held_out: bool) -> None:
        """Counts one kept row."""
        self.formats[row.format] += 1
        self.multi_turn += facts.multi_turn
        self.with_system += facts.system
        self.with_thinking += facts.thinking
        (self._eval if held_out else self._train)[digest] += 1

    def move_to_train(self, digest: bytes) -> None:
        """Counts the held-out rows of this digest as training rows."""
        self._train[digest] += self._eval.pop(digest)

    @property
    def duplicates(self) -> int:
        """Training rows that repeat an earlier one exactly."""
        return sum(self._train.values()) - len(self._train)

    @property
    def eval_leaks(self) -> int:
        """Held-out rows whose exact twin is in the training part."""
        return sum(count for digest, count in self._eval.items() if digest in self._train)
