"""One row of the data as training sees it: rendered by the model's own template, each token marked learned or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparktune.setup.data.formats import RowRefused
from sparktune.setup.data.read import Row, read_rows
from sparktune.setup.data.render import ChatRenderer, supervised_mask
from sparktune.setup.data.tokenizer import ChatTokenizer, load_tokenizer
from sparktune.setup.plan.schema import ModelSpec, Plan

__all__ = ["Preview", "previews", "shorten"]

_LONGEST_PART = 360
_HEAD, _TAIL = 220, 80


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A rendered row."""

    line: int
    """Line number in the file, from 1."""
    format: str
    parts: list[tuple[str, bool]]
    """The whole render in order, as (text, learned): neighbours differ in whether they are learned."""
    tokens: int
    learned: int
    """Tokens that are learned."""


def _mark(row: Row, tokenizer: ChatTokenizer, renderer: ChatRenderer | None) -> Preview:
    if row.messages is not None and renderer is not None:
        rendered = renderer.render(row.messages, row.tools)
        text, spans = rendered.text, rendered.spans
    else:
        text, spans = row.text or "", [(0, len(row.text or ""))]
    tokens = tokenizer.encode_batch([text])[0]
    mask = supervised_mask(tokens.starts, spans)
    parts: list[tuple[str, bool]] = []
    edges = [*tokens.starts.tolist(), len(text)]
    for index, learned in enumerate(mask.tolist()):
        piece = text[edges[index]:edges[index + 1]]
        if parts and parts[-1][1] == bool(learned):
            parts[-1] = (parts[-1][0] + piece, bool(learned))
        else:
            parts.append((piece, bool(learned)))
    return Preview(line=row.line, format=row.format, parts=parts, tokens=len(mask), learned=int(mask.sum()))


def previews(plan: Plan, spec: ModelSpec) -> Iterator[Preview]:
    """Yields the data's rows one after another as training sees them; rows that cannot be used are passed over.

    Args:
        plan: `data`, `text_field` and `thinking` count.
        spec: the model, whose tokenizer and template are used.

    Raises:
        DataError: file or tokenizer cannot be used.
    """
    if plan.data is None:
        return
    tokenizer = load_tokenizer(spec.source)
    renderer: ChatRenderer | None = None
    for row in read_rows(plan.data, plan.text_field):
        if not isinstance(row, Row):
            continue
        if row.messages is not None and renderer is None:
            renderer = ChatRenderer(tokenizer, plan.thinking)
        try:
            yield _mark(row, tokenizer, renderer)
        except RowRefused:
            continue


def shorten(text: str) -> str:
    """Returns `text` without control characters, its middle left out where it is long."""
    clean = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    if len(clean) <= _LONGEST_PART:
        return clean
    return f"{clean[:_HEAD]} [… {len(clean) - _HEAD - _TAIL:,} characters …] {clean[-_TAIL:]}"
