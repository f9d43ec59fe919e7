"""A conversation through the model's own chat template, and the characters of it that are learned.

A turn's span begins where the prompt of an inference would end (the generation prompt, think prefix included, is not
learned) and ends after the end-of-turn token. All assistant turns are learned, nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sparktune.setup.data.formats import RowRefused
from sparktune.setup.data.spans import Marked, Scaffold, content_markers, mark, walk
from sparktune.setup.data.tokenizer import ChatTokenizer
from sparktune.setup.plan.errors import DataError

__all__ = ["MASK_RULE", "ChatRenderer", "Rendered", "supervised_mask"]

MASK_RULE = 1
"""Version of the rule above; a change makes every token cache anew."""

_KNOWN_RENDERS = 4096
_LONGEST_KEY = 8192

Thinking = Literal["auto", "on", "off"]
Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A rendered conversation."""

    text: str
    spans: list[tuple[int, int]]
    """Characters start..end of each assistant turn, end-of-turn token included; ascending."""
    open_turns: int
    """Assistant turns that the template closes with no special token: nothing teaches the model to stop there."""
    left_out: int = 0
    """Messages that say something of which the template shows nothing."""


class ChatRenderer:
    """Renders conversations with one template.

    Args:
        tokenizer: the model's tokenizer.
        thinking: value of `enable_thinking`; auto does not set it.

    Raises:
        DataError: the tokenizer has no chat template, or it is not valid Jinja.
    """

    def __init__(self, tokenizer: ChatTokenizer, thinking: Thinking = "auto") -> None:
        template = tokenizer.template
        if template is None:
            raise DataError(
                f"Chat rows need the model's chat template, but the tokenizer of {tokenizer.source} has none. Use the "
                "instruction-tuned model's tokenizer, or give rows with a `text` field."
            )
        self.tokenizer = tokenizer
        self._settings = {} if thinking == "auto" else {"enable_thinking": thinking == "on"}
        self._markers = content_markers(template)
        self._specials = tokenizer.special_tokens
        self._known: dict[str, str] = {}
        self._check_syntax()

    def text(self, messages: Messages, tools: list[dict[str, Any]] | None = None, *, prompt: bool = False) -> str:
        """Returns the exact render.

        Args:
            prompt: end with the generation prompt.

        Raises:
            RowRefused: code template, with the template's own message.
        """
        try:
            return str(self.tokenizer.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self._settings
            ))
        except Exception as error:  # a template can fail in any way Jinja and Python know
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RowRefused("template", f"the model's chat template refuses the row: {reason}") from error

    def render(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> Rendered:
        """Returns the exact render with the spans of all assistant turns.

        Raises:
            RowRefused: code template if the template refuses the row or changes its text beyond trimming, code
                empty_assistant if it leaves nothing of an assistant turn.
        """
        text = self.text(messages, tools)
        marked = mark(messages, self._markers, text)
        scaffold = walk(text, self._marked_text(marked.messages, tools), marked)
        if scaffold is None:
            raise RowRefused(
                "template", "the chat template changes the messages' text beyond trimming it, so the assistant's part "
                "cannot be told from the rest; look for content that the template rewrites."
            )
        spans, open_turns = [], 0
        openings: dict[tuple[str, str], int] = {}
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                span, closed = self._span(index, scaffold, marked, tools, openings)
                spans.append(span)
                open_turns += not closed
        left_out = set(marked.owners) - {hole.message for hole in scaffold.holes}
        return Rendered(text=text, spans=spans, open_turns=open_turns, left_out=len(left_out))

    def prompt_ids(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Returns the ids of a prompt, generation prompt included: what an inference would start from."""
        return [int(i) for i in self.tokenizer.encode_batch([self.text(messages, tools, prompt=True)])[0].ids]

    def _marked_text(
        self, messages: Messages, tools: list[dict[str, Any]] | None, *, prompt: bool = False
    ) -> str:
        """Returns the render of numbered words: most rows of a file have the same, so it is remembered."""
        key = repr((messages, tools, prompt))
        if len(key) > _LONGEST_KEY:
            return self.text(messages, tools, prompt=prompt)
        if key not in self._known:
            if len(self._known) == _KNOWN_RENDERS:
                self._known.clear()
            self._known[key] = self.text(messages, tools, prompt=prompt)
        return self._known[key]

    # -- one turn

    def _span(
        self, index: int, scaffold: Scaffold, marked: Marked, tools: list[dict[str, Any]] | None,
        openings: dict[tuple[str, str], int],
    ) -> tuple[tuple[int, int], bool]:
        """Returns the characters of the turn at message `index`, and whether a special token closes it.

        `openings` remembers the row's turns that open alike (template text, role before), so that a conversation of
        many turns is not rendered once a turn.
        """
        holes = scaffold.holes
        own = [i for i, hole in enumerate(holes) if hole.message == index]
        if not own:
            raise RowRefused(
                "empty_assistant", f"the chat template leaves nothing of message {index + 1}, an assistant's."
            )
        first = last = own[0]
        seen = {holes[first].piece}
        while last + 1 < len(holes) and holes[last + 1].message == index and holes[last + 1].piece not in seen:
            last += 1
            seen.add(holes[last].piece)
        if any(i > last and holes[i].piece not in marked.names for i in own):
            raise RowRefused(
                "template", f"the chat template mixes the text of message {index + 1}, an assistant's, with another's."
            )
        before, after = scaffold.chunks[first], scaffold.chunks[last + 1]
        previous = holes[first - 1].piece if first else None
        alike = (before, marked.messages[index - 1]["role"] if index else "")
        if alike not in openings:
            openings[alike] = self._opening(index, before, previous, marked, tools)
        start = holes[first].start - len(before) + openings[alike]
        closing = self._closing(after)
        return (start, holes[last].end + (closing or 0)), closing is not None

    def _opening(
        self, index: int, before: str, previous: int | None, marked: Marked, tools: list[dict[str, Any]] | None
    ) -> int:
        """Returns how much of `before`, the template's text up to the turn's first run, an inference's prompt holds."""
        generation = self._generation_prompt
        place = before.rfind(generation) if generation else -1
        if place >= 0:
            return place + len(generation)
        # The turn opens otherwise than a new one would (thinking stripped from history, thinking in a model that does
        # not think by default, a template without generation prompt): compare with the prompt of this very turn.
        try:
            prompt = marked.pattern.split(self._marked_text(marked.messages[:index], tools, prompt=True))
        except RowRefused:
            prompt = []
        if prompt and (int(prompt[-2]) if len(prompt) > 1 else None) == previous:
            common = _common(prompt[-1], before)
            if common:
                return common
        header = generation.split("\n")[0]
        place = before.rfind(header) if header else -1
        if place < 0:
            raise RowRefused(
                "template", f"the chat template does not show where message {index + 1}, an assistant's, begins."
            )
        return place + _common(generation, before[place:])

    def _closing(self, after: str) -> int | None:
        """Returns the length of `after` up to the end of the end-of-turn token; None if no special token is there."""
        usual = self._end_of_turn
        if usual is not None and usual in after:
            return after.index(usual) + len(usual)
        return _first_special(after, self._specials)

    # -- the template itself

    @cached_property
    def _generation_prompt(self) -> str:
        """What add_generation_prompt adds after a user message; empty for templates that add nothing."""
        asked = [{"role": "user", "content": "a"}]
        try:
            without, with_prompt = self.text(asked), self.text(asked, prompt=True)
        except RowRefused:
            return ""
        return with_prompt[len(without):] if with_prompt.startswith(without) else ""

    @cached_property
    def _end_of_turn(self) -> str | None:
        """The special token that closes a plain assistant turn."""
        try:
            text = self.text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "zqz"}])
        except RowRefused:
            return None
        after = text.rpartition("zqz")[2]
        end = _first_special(after, self._specials)
        return None if end is None else next(s for s in self._specials if after[:end].endswith(s))

    def _check_syntax(self) -> None:
        import jinja2

        try:
            self.text([{"role": "user", "content": "a"}])
        except RowRefused as refusal:
            if isinstance(refusal.__cause__, jinja2.TemplateSyntaxError):
                raise DataError(
                    f"The chat template of {self.tokenizer.source} should be valid Jinja; line "
                    f"{refusal.__cause__.lineno}: {refusal.__cause__.message}. Mend chat_template.jinja."
                ) from refusal


def _common(a: str, b: str) -> int:
    """Returns the length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _first_special(text: str, specials: tuple[str, ...]) -> int | None:
    """Returns the end of the first special token in `text`, None without one."""
    found = [(text.index(special), -len(special)) for special in specials if special in text]
    return min(found)[0] - min(found)[1] if found else None


def supervised_mask(starts: npt.NDArray[np.int64], spans: list[tuple[int, int]]) -> npt.NDArray[np.uint8]:
    """Returns uint8 [t]: 1 where a token begins inside a span.

    Args:
        starts: [t] character at which each token begins.
        spans: ascending, not overlapping.
    """
    if not spans:
        return np.zeros(len(starts), dtype=np.uint8)
    edges = np.asarray(spans, dtype=np.int64)
    at = np.searchsorted(edges[:, 0], starts, side="right") - 1
    return ((at >= 0) & (starts < edges[np.maximum(at, 0), 1])).astype(np.uint8)
