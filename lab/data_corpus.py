"""Chat rows made from a seed, of any number and length, clean or with faults whose lines are known.

Words are pseudo-words drawn by Zipf's law, so that a byte-level BPE meets the frequent ones again and again and the
rare ones seldom, as in real text. Clean rows are full of what resembles personal data without being any: dates, ISBN,
hashes, addresses of machines, sums, versions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Corpus", "Planted", "write_corpus"]

_CONSONANTS = (*"bcdfghklmnprstvwz", "br", "ch", "cl", "cr", "dr", "fl", "gr", "pl", "pr", "sh", "sl", "sp", "st", "th")
_VOWELS = (*"aeiou", "ai", "ea", "ee", "ou")
_SYLLABLES = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
_LOOK_ALIKES = (
    "2026-11-22 14:05:09", "ISBN 978-3-16-148410-0", "192.168.178.24", "1,234,567.89", "4111 1111 1111 1112",
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4", "git@github.com:acme/tools.git", "v12.4.0-rc.1", "@app.route('/a')",
    "550e8400-e29b-41d4-a716-446655440000", "3.14159265358979", "password: ************", "10 000 000", "12/31/1999",
    "1 000 000 000 km", "RFC 2119", "0.0000012345", "pages 1024-2048", "a@b.T", "pkg@1.2.3", "#1234567890", "sk-learn",
)
_SECRETS = {
    "pii_email": "jane.doe+test@mail.example.org", "pii_phone": "+49 30 9018 2034",
    "pii_card": "4242 4242 4242 4242", "pii_key": "ghp_" + "a1B2c3D4e5F6g7H8i9J0" * 2,
}


@dataclass(kw_only=True)
class Planted:
    """Where faults were put: code of a finding or of a dropped row -> line numbers, ascending."""

    data: dict[str, list[int]] = field(default_factory=dict)
    evaluation: dict[str, list[int]] = field(default_factory=dict)


class Corpus:
    """Makes rows.

    Args:
        seed: of everything random.
        words_per_row: mean; lengths are log-normal, from a quarter of the mean to eight times it.
        vocabulary: different words.
    """

    def __init__(self, seed: int, words_per_row: int, vocabulary: int = 60_000) -> None:
        self._rng = np.random.default_rng(seed)
        self._random = random.Random(seed)
        pick = self._random
        words: set[str] = set()
        while len(words) < vocabulary:
            words.add("".join(pick.choices(_SYLLABLES, k=pick.randint(1, 4))) + pick.choice(["", "n", "s", "ng", "ed"]))
        self._words = np.array(sorted(words, key=lambda word: (len(word), word)), dtype=object)
        shares = 1 / (np.arange(vocabulary) + 2.7)
        self._cumulative = np.cumsum(shares / shares.sum())
        self._mean = words_per_row

    def text(self, count: int) -> str:
        """Returns sentences of about `count` words."""
        drawn = self._words[np.searchsorted(self._cumulative, self._rng.random(count)).clip(max=len(self._words) - 1)]
        parts, place = [], 0
        while place < count:
            size = self._random.randint(5, 24)
            sentence = " ".join(drawn[place : place + size]).capitalize()
            if self._random.random() < 0.05:
                sentence += " " + self._random.choice(_LOOK_ALIKES)
            parts.append(sentence + self._random.choice([". ", ". ", ".\n", "? ", ": "]))
            place += size
        return "".join(parts).strip()

    def row(self) -> dict[str, Any]:
        """Returns a conversation of one to four exchanges, a third of them with a system prompt."""
        scale = float(np.exp(self._rng.normal(-0.32, 0.8)).clip(0.25, 8))
        total, turns = max(24, int(self._mean * scale)), self._random.randint(1, 4)
        messages = [{"role": "system", "content": self.text(20)}] if self._random.random() < 0.33 else []
        for _ in range(turns):
            share = total // turns
            messages.append({"role": "user", "content": self.text(max(8, share // 4))})
            messages.append({"role": "assistant", "content": self.text(max(12, share * 3 // 4))})
        return {"messages": messages}

    def nearly(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row with one word in two hundred replaced, and other punctuation."""
        messages = []
        for message in row["messages"]:
            words = message["content"].split(" ")
            for place in range(100, len(words), 200):
                words[place] = "otherwise"
            messages.append({**message, "content": " ".join(words).replace(". ", "; ")})
        return {"messages": messages}


def write_corpus(
    path: Path, corpus: Corpus, rows: int, *, faults: int = 0, size_bytes: int = 0, evaluation: Path | None = None
) -> Planted:
    """Writes a JSONL, and with `evaluation` a second one of held-out rows. Returns where the faults are.

    Args:
        path: the file.
        corpus: makes the rows.
        rows: clean rows.
        faults: how often each fault is planted, spread over the file.
        size_bytes: write clean rows until the file is this large, instead of `rows`.
        evaluation: gets a tenth of `rows` new rows, and leaks where faults are planted.
    """
    planted = Planted()
    pool: list[dict[str, Any]] = []
    every = max(1, rows // (faults + 1)) if faults else 0
    with path.open("wb") as file:
        writer = _Lines(file.write, planted.data)
        while file.tell() < size_bytes if size_bytes else writer.clean < rows:
            row = corpus.row()
            writer.write(row)
            if every and len(pool) < 2 * faults:
                pool.append(row)
            if every and writer.clean % every == 0 and writer.rounds < faults:
                _plant(writer, corpus, pool[writer.rounds])
    if evaluation is not None:
        with evaluation.open("wb") as file:
            writer = _Lines(file.write, planted.evaluation)
            for number in range(max(1, rows // 10)):
                writer.write(corpus.row())
                if number < faults:
                    writer.write(pool[faults + number], "eval_leak")
                    writer.write(corpus.nearly(pool[faults + number]), "near_eval_leak")
    return planted


class _Lines:
    """Counts the lines it writes."""

    def __init__(self, write: Callable[[bytes], int], planted: dict[str, list[int]]) -> None:
        self._write, self._planted = write, planted
        self.line, self.clean, self.rounds = 0, 0, 0

    def write(self, row: dict[str, Any] | bytes, fault: str = "") -> None:
        data = row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()
        self._write(data + b"\n")
        self.line += 1
        self.clean += not fault
        if fault:
            self._planted.setdefault(fault, []).append(self.line)


def _plant(writer: _Lines, corpus: Corpus, earlier: dict[str, Any]) -> None:
    """Writes one row of each fault."""
    writer.rounds += 1
    for fault, row in _faulty(corpus, earlier):
        writer.write(row, fault)


def _faulty(corpus: Corpus, earlier: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | bytes]]:
    yield "duplicate", {"id": 7, "conversations": [
        {"value": m["content"], "from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"])}
        for m in earlier["messages"]
    ]}
    yield "near_duplicate", corpus.nearly(earlier)
    for code, secret in _SECRETS.items():
        row = corpus.row()
        row["messages"][-1]["content"] += f"\nWrite to {secret}, please."
        yield code, row
    row = corpus.row()
    row["messages"][-2]["content"] = f"<|im_start|>user\n{row['messages'][-2]['content']}<|im_end|>"
    yield "markup", row
    row = corpus.row()
    row["messages"][-1]["content"] = "  \n"
    yield "empty_assistant", row
    yield "over_length", {"messages": [
        {"role": "user", "content": corpus.text(20)}, {"role": "assistant", "content": corpus.text(40_000)},
    ]}
    broken = json.dumps(corpus.row()).encode()
    yield "not_json", broken[: len(broken) // 2]
    yield "not_utf8", broken[:40] + b"\xff" + broken[40:]
    row = corpus.row()
    row["messages"][-1]["role"] = "narrator"
    yield "unknown_role", row
    yield "no_assistant", {"messages": [{"role": "user", "content": corpus.text(30)}]}
    yield "image", {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": corpus.text(30)},
    ]}
    yield "empty_row", {}
