"""One row after the other, from bytes to everything that is known about it: the work that processes share.

A RowExaminer parses, renders, masks, tokenises and scans a chunk of lines. It keeps nothing between chunks, so any
process may take any chunk and the results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sparktune.setup.data.checks import RowFacts, facts_of
from sparktune.setup.data.duplicates import SIGNATURE_WIDTH, row_parts, signatures
from sparktune.setup.data.formats import RowRefused
from sparktune.setup.data.read import RawLine, Row, parse_row
from sparktune.setup.data.render import ChatRenderer, supervised_mask
from sparktune.setup.data.tokenizer import ChatTokenizer, Tokens
from sparktune.setup.plan.errors import DataError
from sparktune.setup.plan.schema import RowProblem

__all__ = ["Examined", "RowExaminer", "RowRules"]

_NO_IDS = np.zeros(0, dtype=np.uint32)
_NO_MASK = np.zeros(0, dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """What decides a row's fate."""

    text_field: str = "text"
    thinking: Literal["auto", "on", "off"] = "auto"
    max_seq_length: int = 16384
    over_length: Literal["drop", "truncate", "error"] = "drop"
    vocab_size: int = 0
    tokenises: bool = True
    """False: only parse the rows and make their signatures; no tokenizer is needed."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One line, examined. Of a row that cannot be used only place, problem and findings count."""

    line: int
    offset: int
    """Byte at which the line begins."""
    problem: RowProblem | None = None
    digest: bytes = b""
    """sha256 of the normalised row."""
    facts: RowFacts | None = None
    truncated: bool = False
    open_turns: int = 0
    ids: npt.NDArray[np.uint32] = field(default_factory=_NO_IDS.copy)
    supervised: npt.NDArray[np.uint8] = field(default_factory=_NO_MASK.copy)
    signature: npt.NDArray[np.uint32] | None = None
    """uint32 [SIGNATURE_WIDTH] of a usable row."""


@dataclass(kw_only=True)
class _Draft:
    """A row on its way through a chunk."""

    raw: RawLine
    row: Row | None = None
    problem: RowProblem | None = None
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    open_turns: int = 0
    facts: RowFacts | None = None
    truncated: bool = False
    ids: npt.NDArray[np.uint32] = field(default_factory=_NO_IDS.copy)
    supervised: npt.NDArray[np.uint8] = field(default_factory=_NO_MASK.copy)


class RowExaminer:
    """Examines chunks of lines.

    Args:
        rules: what decides a row's fate.
        tokenizer: the model's; None where `rules.tokenises` is false.
    """

    def __init__(self, rules: RowRules, tokenizer: ChatTokenizer | None) -> None:
        assert tokenizer is not None or not rules.tokenises
        self._rules = rules
        self._tokenizer = tokenizer
        self._renderer: ChatRenderer | None = None

    def examine(self, chunk: Sequence[RawLine]) -> list[Examined]:
        """Returns what is known of each line, in their order.

        Raises:
            DataError: the tokenizer lacks what these rows need (a chat template, an end-of-text token).
        """
        drafts = [self._draft(raw) for raw in chunk]
        if self._tokenizer is not None:
            todo = [draft for draft in drafts if draft.problem is None]
            encoded = self._tokenizer.encode_batch([draft.text for draft in todo])
            for draft, tokens in zip(todo, encoded, strict=True):
                self._finish(draft, tokens, self._tokenizer)
        usable = [draft.row for draft in drafts if draft.problem is None and draft.row is not None]
        made = iter(signatures([row_parts(row) for row in usable]))
        return [self._result(draft, made) for draft in drafts]

    def _draft(self, raw: RawLine) -> _Draft:
        """Parses and renders one line."""
        parsed = parse_row(raw.line, raw.data, self._rules.text_field)
        if isinstance(parsed, RowProblem):
            return _Draft(raw=raw, problem=parsed)
        draft = _Draft(raw=raw, row=parsed)
        if self._tokenizer is None:
            return draft
        if parsed.messages is None:
            assert parsed.text is not None
            draft.text = parsed.text
        else:
            self._renderer = self._renderer or ChatRenderer(self._tokenizer, self._rules.thinking)
            try:
                rendered = self._renderer.render(parsed.messages, parsed.tools)
            except RowRefused as refusal:
                draft.problem = RowProblem(line=raw.line, code=refusal.code, text=refusal.text)
                return draft
            draft.text, draft.spans, draft.open_turns = rendered.text, rendered.spans, rendered.open_turns
            draft.facts = facts_of(parsed, self._tokenizer.special_tokens, rendered.left_out)
            return draft
        draft.facts = facts_of(parsed, self._tokenizer.special_tokens)
        return draft

    def _finish(self, draft: _Draft, tokens: Tokens, tokenizer: ChatTokenizer) -> None:
        """Applies the rules about ids, length and labels."""
        assert draft.row is not None
        rules, line = self._rules, draft.raw.line
        ids, supervised = tokens.ids, supervised_mask(tokens.starts, draft.spans)
        if draft.row.messages is None:
            ids, supervised = _closed(ids, tokenizer)
        draft.truncated = len(ids) > rules.max_seq_length and rules.over_length == "truncate"
        draft.problem = _objection(line, ids, rules)
        if draft.truncated:
            ids, supervised = ids[: rules.max_seq_length], supervised[: rules.max_seq_length]
        if draft.problem is None and not supervised[1:].any():
            why = (
                f"they all lie past max_seq_length ({rules.max_seq_length:,} tokens)" if draft.truncated
                else "it has none"
            )
            draft.problem = RowProblem(
                line=line, code="all_masked", text=f"the row should have tokens to learn from; {why}."
            )
        draft.ids, draft.supervised = ids, supervised

    def _result(self, draft: _Draft, made: Any) -> Examined:
        raw = draft.raw
        if draft.problem is not None or draft.row is None:
            return Examined(line=raw.line, offset=raw.offset, problem=draft.problem, facts=draft.facts)
        signature = next(made)
        assert signature.shape == (SIGNATURE_WIDTH,)
        return Examined(
            line=raw.line, offset=raw.offset, digest=draft.row.digest, facts=draft.facts, truncated=draft.truncated,
            open_turns=draft.open_turns, ids=draft.ids, supervised=draft.supervised, signature=signature,
        )


def _closed(
    ids: npt.NDArray[np.uint32], tokenizer: ChatTokenizer
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Returns plain text as it is trained: after the tokenizer's own opening, before its end-of-text token."""
    eos = tokenizer.tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"Rows of plain text end with the tokenizer's eos_token, but the tokenizer of {tokenizer.source} has none. "
            "Name one in tokenizer_config.json."
        )
    closing = [] if len(ids) and ids[-1] == eos else [eos]
    ids = np.concatenate([tokenizer.opening_ids, ids, closing]).astype(np.uint32)
    return ids, np.ones(len(ids), dtype=np.uint8)


def _objection(line: int, ids: npt.NDArray[np.uint32], rules: RowRules) -> RowProblem | None:
    """Returns what stands against using these ids, if anything."""
    if not len(ids):
        return RowProblem(line=line, code="empty_row", text="the tokenizer makes no token of the row's text.")
    highest = int(ids.max())
    if highest >= rules.vocab_size:
        return RowProblem(
            line=line, code="token_range",
            text=f"the tokenizer gives id {highest:,}, but the model's vocabulary ends at {rules.vocab_size - 1:,}; "
            "tokenizer and model do not belong together.",
        )
    if len(ids) > rules.max_seq_length and rules.over_length != "truncate":
        return RowProblem(
            line=line, code="over_length",
            text=f"the example has {len(ids):,} tokens; --max-seq-length allows {rules.max_seq_length:,}.",
        )
    return None
