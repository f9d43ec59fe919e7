"""Where each message's text stands in a rendered conversation: the scaffolding method.

The same conversation is rendered twice by the same template: once as it is, once with every run of its own text
replaced by a unique word. The second render is the template's scaffolding with numbered holes. Walking the first one
along it gives the exact characters of every run, so that nothing written inside a message (a marker, a copy of another
turn) can pose as the template's. White space around a run stays in both renders, so trimming acts on both alike, and
so do the strings that templates look for inside content (think tags).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Hole", "Marked", "Scaffold", "content_markers", "mark", "walk"]

# Tags that templates of all families cut content at.
_KNOWN_MARKERS = ("<think>", "</think>", "<tool_response>", "</tool_response>")
_TESTED_STRINGS = re.compile(
    r"""(?:split|startswith|endswith)\(\s*(?P<q>['"])(?P<a>[^'"]{3,40})(?P=q)\s*\)"""
    r"""|(?P<r>['"])(?P<b>[^'"]{3,40})(?P=r)\s+(?:not\s+)?in\s"""
)


@dataclass(frozen=True, kw_only=True)
class Hole:
    """A run of a message's own text, at one place of the render."""

    piece: int
    """Number of the run."""
    message: int
    """Index of its message."""
    start: int
    end: int
    """Characters start..end of the real render."""


@dataclass(frozen=True, kw_only=True)
class Scaffold:
    """A real render, cut into the template's text and the messages' own."""

    chunks: list[str]
    """The template's text: one before each hole and one after the last."""
    holes: list[Hole]
    """In the order of the render."""


@dataclass(kw_only=True)
class Marked:
    """A conversation whose runs of text are replaced by numbered words."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Run number -> its text."""
    owners: list[int] = field(default_factory=list)
    """Run number -> index of its message."""
    names: set[int] = field(default_factory=set)
    """Runs that are names of tools: templates may repeat those in the tool's answer."""
    pattern: re.Pattern[str]
    """Matches the numbered words."""


def content_markers(template: str) -> re.Pattern[str]:
    """Returns what matches the strings a template looks for inside content; they stay in the copy as they are."""
    tested = {m["a"] or m["b"] for m in _TESTED_STRINGS.finditer(template)}
    # A marker has punctuation; words such as 'tool_calls' are keys or roles.
    markers = {t for t in tested if re.search(r"[<>\[\]|]", t) and "\\" not in t} | set(_KNOWN_MARKERS)
    return re.compile("(" + "|".join(re.escape(m) for m in sorted(markers, key=lambda m: (-len(m), m))) + ")")


def mark(messages: Sequence[dict[str, Any]], markers: re.Pattern[str], taken: str) -> Marked:
    """Returns a copy in which every run of content, reasoning, tool name and tool argument is a numbered word.

    Args:
        messages: the conversation.
        markers: strings that stay, from `content_markers`.
        taken: the real render; the words are chosen so as not to occur in it.
    """
    nonce = next(n for n in range(10**9) if f"zq{n}q" not in taken)
    marked = Marked(pattern=re.compile(rf"zq{nonce}q(\d+)qz"))

    def replaced(value: Any, owner: int) -> Any:
        if isinstance(value, dict):
            return {k: replaced(v, owner) for k, v in value.items()}
        if isinstance(value, list):
            return [replaced(v, owner) for v in value]
        if not isinstance(value, str):
            return value
        parts = []
        for run in markers.split(value):
            core = run.strip()
            if core and not markers.fullmatch(run):
                word = f"zq{nonce}q{len(marked.texts)}qz"
                marked.texts.append(core)
                marked.owners.append(owner)
                lead = run[: len(run) - len(run.lstrip())]
                run = lead + word + run[len(lead) + len(core):]
            parts.append(run)
        return "".join(parts)

    for owner, message in enumerate(messages):
        copy = dict(message)
        for key in ("content", "reasoning_content", "reasoning", "thinking"):
            if key in copy:
                copy[key] = replaced(copy[key], owner)
        if "tool_calls" in copy:
            copy["tool_calls"] = []
            for call in message["tool_calls"]:
                before = len(marked.texts)
                name = replaced(call["function"]["name"], owner)
                marked.names.update(range(before, len(marked.texts)))
                arguments = replaced(call["function"]["arguments"], owner)
                copy["tool_calls"].append(call | {"function": {"name": name, "arguments": arguments}})
        marked.messages.append(copy)
    return marked


# The last hole's characters, after those of all holes before it.
_Path = tuple[Any, int, int] | None


def walk(real: str, marked_render: str, marked: Marked) -> Scaffold | None:
    """Walks the real render along the scaffolding; None where the two do not agree.

    A run stands there as it is, or escaped as inside a JSON string.
    """
    parts = marked.pattern.split(marked_render)
    chunks, pieces = parts[0::2], [int(number) for number in parts[1::2]]
    if not real.startswith(chunks[0]):
        return None
    # Position after a hole and its chunk -> the ends of all holes so far, as a linked list. More than one position is
    # alive only while a run and its escaped form both fit.
    alive: dict[int, _Path] = {len(chunks[0]): None}
    for piece, chunk in zip(pieces, chunks[1:], strict=True):
        after: dict[int, _Path] = {}
        for position, path in alive.items():
            for form in _forms(marked.texts[piece]):
                end = position + len(form)
                if real.startswith(form, position) and real.startswith(chunk, end):
                    after.setdefault(end + len(chunk), (path, position, end))
        if not after:
            return None
        alive = after
    if len(real) not in alive:
        return None
    ends = []
    link = alive[len(real)]
    while link is not None:
        link, start, end = link
        ends.append((start, end))
    holes = [
        Hole(piece=piece, message=marked.owners[piece], start=start, end=end)
        for piece, (start, end) in zip(pieces, reversed(ends), strict=True)
    ]
    return Scaffold(chunks=chunks, holes=holes)


def _forms(text: str) -> tuple[str, ...]:
    """The text as it is, and escaped as inside a JSON string, where that differs."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    ascii_only = json.dumps(text)[1:-1]
    return tuple(dict.fromkeys((text, escaped, ascii_only)))
