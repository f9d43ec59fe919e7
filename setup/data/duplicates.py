"""Near duplicates: rows that say almost the same, found by MinHash and confirmed by their exact similarity.

A row is a set of shingles (hashes of five words in a row). MinHash signatures (rensa) give candidates through banding
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4); a candidate counts only when the exact
Jaccard similarity of the system prompt, of what is asked and of what is answered each reach the threshold. So rows
that share a long document but ask something else about it are no duplicates.

The bands are sorted here, one at a time, over a signature file on disk: a library's index keeps every band of every
row in memory.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from sparktune.setup.data.read import Row

__all__ = ["NEAR_RULE", "SIGNATURE_WIDTH", "THRESHOLD", "SignatureFile", "row_parts", "shingles", "signatures"]

NEAR_RULE = 1
"""Version of the rules of this file; a change makes every cached finding anew."""
THRESHOLD = 0.8
"""Jaccard similarity from which two texts count as nearly the same."""

_SHINGLE_WORDS = 5
# 21 bands of 6 find 99.8 % of the pairs that are exactly at the threshold, and more above it.
_BANDS, _BAND_ROWS = 21, 6
_WHOLE = 128
# The answer's own signature spares the exact comparison of rows that share only a long question.
_ANSWER = 64
SIGNATURE_WIDTH = _WHOLE + _ANSWER
# The estimates scatter by 0.035 (128 values) and 0.05 (64); three of that below the threshold lose nothing.
_WHOLE_FLOOR, _ANSWER_FLOOR = THRESHOLD - 0.11, THRESHOLD - 0.15
_SEED = 3407
# Scripts without spaces between words: a character is a word there.
_ONE_BY_ONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ONE_BY_ONE}]|[^\W_{_ONE_BY_ONE}]+")
_ODD = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD,
     0xC4CEB9FE1A85EC53],
    dtype=np.uint64,
)
_CHUNK = 65_536

Shingles = npt.NDArray[np.uint64]
Parts = tuple[str, str, str]


def row_parts(row: Row) -> Parts:
    """Returns what a row says, as (system prompt, what is asked, what is answered); plain text is all answer."""
    if row.messages is None:
        return "", "", row.text or ""
    parts: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    for message in row.messages:
        texts = parts["user" if message["role"] == "tool" else message["role"]]
        texts.append(message["content"])
        if message.get("reasoning_content"):
            texts.append(message["reasoning_content"])
        texts.extend(json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ()))
    return "\n".join(parts["system"]), "\n".join(parts["user"]), "\n".join(parts["assistant"])


def shingles(text: str) -> Shingles:
    """Returns the hashes of every five words in a row: uint64, ascending, each once; one of a text with fewer words.

    Case, punctuation and white space do not count; a text without any word is one shingle of its own.
    """
    return np.unique(_shingles(text))


def _shingles(text: str) -> Shingles:
    """The same, in the order of the text, repeated ones as often as they occur."""
    words = _WORD.findall(text.lower()) or [text.strip()]
    if len(_CODES) > _CODES_KEPT:
        _CODES.clear()
    codes = np.fromiter(map(_CODES.__getitem__, words), dtype=np.uint64, count=len(words))
    width = min(_SHINGLE_WORDS, len(words))
    hashes = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for i in range(width):
        hashes += (codes[i : len(codes) - width + 1 + i] + np.uint64(1)) * _ODD[i]
    hashes ^= hashes >> np.uint64(31)
    hashes *= _ODD[5]
    return hashes ^ (hashes >> np.uint64(33))


class _Codes(dict[str, int]):
    """Word -> its CRC-32, worked out once."""

    def __missing__(self, word: str) -> int:
        code = self[word] = crc32(word.encode("utf-8", "surrogatepass"))
        return code


_CODES = _Codes()
_CODES_KEPT = 200_000


def signatures(rows: Sequence[Parts]) -> npt.NDArray[np.uint32]:
    """Returns uint32 [rows, SIGNATURE_WIDTH]: MinHash values of question and answer together, then of the answer."""
    from rensa import RMinHash

    answers = [_shingles(answered) for _, _, answered in rows]
    whole = [
        np.concatenate([_shingles(asked), answer]) if asked else answer
        for (_, asked, _), answer in zip(rows, answers, strict=True)
    ]
    columns = []
    for sets, width in ((whole, _WHOLE), (answers, _ANSWER)):
        ends = np.cumsum([0, *(len(one) for one in sets)], dtype=np.uint64)
        flat = np.concatenate(sets) if sets else np.zeros(0, dtype=np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, ends, width, _SEED)
        columns.append(np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(rows), width))
    return np.concatenate(columns, axis=1)


def similar(one: Parts, other: Parts) -> bool:
    """Returns whether each part of two rows reaches the threshold, by exact Jaccard similarity."""
    return all(_jaccard(a, b) >= THRESHOLD for a, b in zip(map(_set, one), map(_set, other), strict=True))


@lru_cache(maxsize=64)
def _set(text: str) -> Shingles:
    return shingles(text)


def _jaccard(a: Shingles, b: Shingles) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class SignatureFile:
    """Signatures of many rows, on disk: 768 bytes a row.

    Args:
        folder: where the file lies while it is needed; it has no name there and goes with the process.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / f"signatures-{secrets.token_hex(8)}.partial"
        self._file: IO[bytes] = path.open("x+b")
        path.unlink()
        self._rows = 0

    def __len__(self) -> int:
        """Rows so far."""
        return self._rows

    def append(self, signature: npt.NDArray[np.uint32]) -> None:
        """Adds one row's signature, uint32 [SIGNATURE_WIDTH].

        Raises:
            OSError: the disk is full.
        """
        self._file.write(np.ascontiguousarray(signature, dtype="<u4").data)
        self._rows += 1

    def close(self) -> None:
        """Removes the file."""
        self._file.close()

    def near_pairs(self, parts: Callable[[int], Parts], skip: npt.NDArray[np.bool_]) -> dict[int, int]:
        """Returns row -> the earliest row that it nearly repeats, for every row that does.

        Args:
            parts: what a row says, by its number in the order of `append`.
            skip: bool [rows]: rows left out, exact duplicates for instance.

        Raises:
            OSError: the disk is full.
        """
        if self._rows < 2:
            return {}
        self._file.flush()
        matrix = np.memmap(self._file, dtype="<u4", mode="r", shape=(self._rows, SIGNATURE_WIDTH))
        found: dict[int, int] = {}
        read = lru_cache(maxsize=256)(parts)
        for first, later in self._likely(matrix, self._candidates(matrix, skip)):
            if later not in found and similar(read(first), read(later)):
                found[later] = found.get(first, first)
        return found

    def _candidates(self, matrix: Any, skip: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Returns int64 [pairs, 2], ascending by the later row: rows that share a band with the first or the previous.

        Comparing with those two keeps the work linear where thousands of rows are alike.
        """
        rows = np.flatnonzero(~skip)
        pairs = []
        for band in range(_BANDS):
            keys = np.empty(len(rows), dtype=np.uint64)
            for start in range(0, len(rows), _CHUNK):
                here = slice(start, start + _CHUNK)
                values = matrix[rows[here], band * _BAND_ROWS : (band + 1) * _BAND_ROWS].astype(np.uint64)
                keys[here] = (values * _ODD).sum(axis=1, dtype=np.uint64)
            order = np.argsort(keys, kind="stable")
            same = keys[order][1:] == keys[order][:-1]
            opening = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
            later = np.flatnonzero(same) + 1
            for earlier in (opening[later], later - 1):
                pairs.append(np.stack([rows[order[earlier]], rows[order[later]]], axis=1))
        every = np.unique(np.concatenate(pairs)[:, ::-1], axis=0)
        return every[:, ::-1]

    @staticmethod
    def _likely(matrix: Any, pairs: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        """Returns the pairs whose signatures agree far enough to be worth an exact comparison."""
        kept = []
        for start in range(0, len(pairs), _CHUNK // 8):
            some = pairs[start : start + _CHUNK // 8]
            equal = matrix[some[:, 0]] == matrix[some[:, 1]]
            good = (equal[:, :_WHOLE].mean(axis=1) >= _WHOLE_FLOOR) & (equal[:, _WHOLE:].mean(axis=1) >= _ANSWER_FLOOR)
            kept += [(int(first), int(later)) for first, later in some[good]]
        return kept
