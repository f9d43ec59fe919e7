"""What is said about rows beside their tokens: repeats, leakage into the held-out part, turns, thinking, findings."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparktune.setup.data.duplicates import Parts, SignatureFile, row_parts
from sparktune.setup.data.pii import scan
from sparktune.setup.data.read import Row, parse_row, raw_line_at
from sparktune.setup.data.split import split_version
from sparktune.setup.plan.schema import Finding, RowProblem

__all__ = ["LINES_KEPT", "RowFacts", "RowTally", "facts_of"]

LINES_KEPT = 1000
"""Line numbers of each finding that are kept."""

# What other tools' templates write around messages; inside a message it means that the text was rendered before.
_MARKUP = (
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>", "<|user|>",
    "<|assistant|>", "<|endoftext|>", "<|end_of_text|>", "<start_of_turn>", "<end_of_turn>", "[/INST]", "<<SYS>>",
    "### Response:",
)


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """Facts about one row."""

    format: str
    multi_turn: bool
    """More than one assistant turn."""
    system: bool
    """A system message that says something."""
    thinking: bool
    """An assistant turn with reasoning."""
    markup: bool
    """Template markup inside a message: the text was rendered before."""
    left_out: bool
    """A message of which the template shows nothing."""
    pii: dict[str, int]
    """Kind (see pii.KINDS) -> places."""


def facts_of(row: Row, special_tokens: Sequence[str] = (), left_out: int = 0) -> RowFacts:
    """Returns the facts of one row.

    Args:
        row: the row.
        special_tokens: the tokenizer's; those of the form <|...|> inside a message are markup.
        left_out: messages of which the template shows nothing.
    """
    messages = row.messages or []
    assistants = [m for m in messages if m["role"] == "assistant"]
    text = "\n".join(part for part in row_parts(row) if part)
    return RowFacts(
        format=row.format,
        multi_turn=len(assistants) > 1,
        system=any(m["role"] == "system" and m["content"].strip() for m in messages),
        thinking=any((m.get("reasoning_content") or "").strip() or _thinks(m["content"]) for m in assistants),
        # plain text may hold the markup that it is to teach
        markup=bool(messages) and _has_markup(text, special_tokens),
        left_out=bool(left_out),
        pii=dict(Counter(found.kind for found in scan(text))),
    )


def _has_markup(text: str, special_tokens: Sequence[str]) -> bool:
    own = [token for token in special_tokens if token.startswith("<|")] if "<|" in text else []
    return any(marker in text for marker in (*_MARKUP, *own))


def _thinks(content: str) -> bool:
    """Whether content holds a think block that is not empty; the opening tag may be missing (it was in the prompt)."""
    thought, closed, _ = content.partition("</think>")
    return bool(closed and thought.rpartition("<think>")[2].strip())


class _Findings:
    """Findings of one file, by code."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}

    def add(self, code: str, line: int, count: int = 1) -> None:
        one = self._found.setdefault(code, Finding(rows=0, count=0, lines=[]))
        one.rows += 1
        one.count += count
        if len(one.lines) < LINES_KEPT:
            one.lines.append(line)

    def rows(self, code: str) -> int:
        return self._found[code].rows if code in self._found else 0

    def to_json(self) -> dict[str, Any]:
        return {code: one.model_dump() for code, one in sorted(self._found.items())}


@dataclass(kw_only=True)
class RowTally:
    """Facts summed over the examples that are kept: 50 bytes a row here, the signatures on disk.

    Args:
        signatures: a new, empty file.
    """

    signatures: SignatureFile
    formats: Counter[str] = field(default_factory=Counter)
    multi_turn: int = 0
    with_system: int = 0
    with_thinking: int = 0
    _findings: tuple[_Findings, _Findings] = field(default_factory=lambda: (_Findings(), _Findings()))
    _digests: bytearray = field(default_factory=bytearray)
    _lines: array[int] = field(default_factory=lambda: array("q"))
    _offsets: array[int] = field(default_factory=lambda: array("q"))
    _files: bytearray = field(default_factory=bytearray)
    _held: bytearray = field(default_factory=bytearray)

    def add(
        self, facts: RowFacts, digest: bytes, signature: npt.NDArray[np.uint32], *, line: int, offset: int, file: int,
        held_out: bool,
    ) -> None:
        """Counts one kept row of file 0 (the data) or 1 (evaluation data of its own)."""
        self.formats[facts.format] += 1
        self.multi_turn += facts.multi_turn
        self.with_system += facts.system
        self.with_thinking += facts.thinking
        for code in ("markup", "left_out"):
            if getattr(facts, code):
                self._findings[file].add(code, line)
        for kind, count in facts.pii.items():
            self._findings[file].add(f"pii_{kind}", line, count)
        self._digests += digest
        self._lines.append(line)
        self._offsets.append(offset)
        self._files.append(file)
        self._held.append(held_out)
        self.signatures.append(signature)

    def __len__(self) -> int:
        """Rows so far."""
        return len(self._lines)

    def digest(self, row: int) -> bytes:
        """Returns the digest of a row, by its number."""
        return bytes(self._digests[32 * row : 32 * row + 32])

    def move_to_train(self, digest: bytes) -> None:
        """Counts the held-out rows of this digest as training rows."""
        for row in range(len(self)):
            if self.digest(row) == digest:
                self._held[row] = False

    def summary(self, files: Sequence[Path], text_field: str) -> dict[str, Any]:
        """Returns what the report says of the rows, as JSON values: counts, findings with their lines, the split.

        Args:
            files: the data, and the evaluation data where there is one; near duplicates are read again.
            text_field: see `read_rows`.

        Raises:
            DataError: a file cannot be read any more.
            OSError: the disk of the signatures is full.
        """
        repeated = self._exact()
        self._near(repeated, self._reader(files, text_field))
        train, held = self._findings
        return {
            "formats": dict(self.formats), "multi_turn": self.multi_turn, "with_system": self.with_system,
            "with_thinking": self.with_thinking, "duplicates": train.rows("duplicate"),
            "near_duplicates": train.rows("near_duplicate"),
            "eval_leaks": train.rows("eval_leak") + held.rows("eval_leak"),
            "near_leaks": train.rows("near_eval_leak") + held.rows("near_eval_leak"),
            "findings": train.to_json(), "eval_findings": held.to_json(),
            "split": split_version(self.digest(row) for row in range(len(self)) if self._held[row]),
        }

    def _exact(self) -> npt.NDArray[np.bool_]:
        """Finds exact duplicates and leaks. Returns which rows repeat an earlier one or a training row."""
        repeated = np.zeros(len(self), dtype=np.bool_)
        training = {self.digest(row) for row in range(len(self)) if not self._held[row]}
        seen: set[bytes] = set()
        for row in range(len(self)):
            digest, held = self.digest(row), self._held[row]
            if held and digest in training:
                self._findings[self._files[row]].add("eval_leak", self._lines[row])
                repeated[row] = True
            elif digest in seen:
                repeated[row] = True
                if not held:
                    self._findings[self._files[row]].add("duplicate", self._lines[row])
            seen.add(digest)
        return repeated

    def _near(self, repeated: npt.NDArray[np.bool_], read: Callable[[int], Parts]) -> None:
        """Finds near duplicates in the training part, and held-out rows that nearly repeat a training row."""
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for later, first in self.signatures.near_pairs(read, repeated).items():
            groups[first].append(later)
        found = []
        for first, repeats in groups.items():
            members = sorted([first, *repeats])
            train = [row for row in members if not self._held[row]]
            found += [(row, "near_duplicate") for row in train[1:]]
            found += [(row, "near_eval_leak") for row in members if self._held[row] and train]
        for row, code in sorted(found):
            self._findings[self._files[row]].add(code, self._lines[row])

    def _reader(self, files: Sequence[Path], text_field: str) -> Callable[[int], Parts]:
        def read(row: int) -> Parts:
            line = self._lines[row]
            again = parse_row(line, raw_line_at(files[self._files[row]], self._offsets[row]), text_field)
            return ("", "", f"unreadable {line}") if isinstance(again, RowProblem) else row_parts(again)

        return read
