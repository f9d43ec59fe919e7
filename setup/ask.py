"""How a question is put: with questionary on a capable terminal, as numbered lines with `--plain` or TERM=dumb.

Prompts appear on standard error, so that standard output carries data only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO

import questionary
from prompt_toolkit.input import Input
from prompt_toolkit.output import Output
from prompt_toolkit.output.defaults import create_output

from sparktune.setup import strings

__all__ = ["BACK", "Asker", "Option", "PlainAsker", "TerminalAsker"]

BACK = "\0back"
"""What a question returns when the user wants the one before."""
_POINTER = 6
"""Columns that the list's pointer and margin take."""
Option = tuple[str, str]
"""(value, what is shown)."""
Check = Callable[[str], str | None]
"""Takes a typed text and returns what is wrong with it, or None."""


def _cut(text: str, width: int) -> str:
    """Returns what fits into one line: a list whose lines wrap cannot be read."""
    return text if len(text) <= width else text[: max(width - 1, 1)] + "…"


class Asker(Protocol):
    """Asks one question. Ctrl-C raises KeyboardInterrupt."""

    def choose(self, question: str, options: Sequence[Option], default: str | None, back: bool) -> str:
        """Returns the value of one option, or BACK."""

    def choose_many(self, question: str, options: Sequence[Option], default: Sequence[str], back: bool) -> list[str]:
        """Returns the values of any number of options, or [BACK]."""

    def text(self, question: str, default: str, check: Check, back: bool, path: bool = False) -> str:
        """Returns a text that `check` accepts, or BACK for a lone `<`."""

    def tell(self, text: str) -> None:
        """Shows a sentence."""


class TerminalAsker:
    """Arrow keys, completion of paths, checks while typing.

    Args:
        keys: where key presses come from; the terminal when left out.
        screen: where prompts appear; standard error when left out.
    """

    def __init__(self, keys: Input | None = None, screen: Output | None = None) -> None:
        self._io: dict[str, Any] = {"output": screen or create_output(stdout=sys.stderr)}
        if keys is not None:
            self._io["input"] = keys

    def choose(self, question: str, options: Sequence[Option], default: str | None, back: bool) -> str:
        """Shows the options as a list; see `Asker`."""
        width = self._io["output"].get_size().columns - _POINTER
        choices = [questionary.Choice(_cut(shown, width), value=value) for value, shown in options]
        if back:
            choices.append(questionary.Choice(strings.BACK, value=BACK))
        first = default if default in {c.value for c in choices} else choices[0].value
        return str(questionary.select(question, choices=choices, default=first, **self._io).unsafe_ask())

    def choose_many(self, question: str, options: Sequence[Option], default: Sequence[str], back: bool) -> list[str]:
        """Shows the options with boxes to tick; see `Asker`."""
        choices = [questionary.Choice(shown, value=value, checked=value in default) for value, shown in options]
        if back:
            choices.append(questionary.Choice(strings.BACK, value=BACK))
        picked = list(questionary.checkbox(question, choices=choices, **self._io).unsafe_ask())
        return [BACK] if BACK in picked else picked

    def text(self, question: str, default: str, check: Check, back: bool, path: bool = False) -> str:
        """Takes a line; see `Asker`."""

        def accept(typed: str) -> bool | str:
            return (back and typed.strip() == "<") or check(typed.strip()) or True

        kind = questionary.path if path else questionary.text
        message = question + (strings.BACK_HINT if back else "")
        typed = str(kind(message, default=default, validate=accept, **self._io).unsafe_ask()).strip()
        return BACK if back and typed == "<" else typed

    def tell(self, text: str) -> None:
        """Shows a sentence on standard error."""
        print(text, file=sys.stderr)


class PlainAsker:
    """Numbered lines and plain reading: for dumb terminals, screen readers and logs.

    Args:
        keys: where answers come from.
        screen: where questions appear.
    """

    def __init__(self, keys: TextIO | None = None, screen: TextIO | None = None) -> None:
        self._keys = keys or sys.stdin
        self._screen = screen or sys.stderr

    def _line(self, prompt: str) -> str:
        print(prompt, end=" ", file=self._screen, flush=True)
        line = self._keys.readline()
        if not line:
            raise KeyboardInterrupt  # end of input: nobody is left to answer
        return line.strip()

    def _show(self, question: str, options: Sequence[Option], marked: Sequence[str], back: bool) -> list[Option]:
        numbered = [*options, *([(BACK, strings.BACK)] if back else [])]
        self.tell(question)
        for number, (value, shown) in enumerate(numbered, 1):
            self.tell(f"  {number}. {shown}{' *' if value in marked else ''}")
        return numbered

    def choose(self, question: str, options: Sequence[Option], default: str | None, back: bool) -> str:
        """Takes a number; an empty line takes the starred option; see `Asker`."""
        numbered = self._show(question, options, [default or ""], back)
        while True:
            typed = self._line(strings.PLAIN_NUMBER.format(count=len(numbered)))
            if not typed and default is not None:
                return default
            if typed.isdecimal() and 1 <= int(typed) <= len(numbered):
                return numbered[int(typed) - 1][0]

    def choose_many(self, question: str, options: Sequence[Option], default: Sequence[str], back: bool) -> list[str]:
        """Takes numbers separated by commas; an empty line takes the starred ones, 0 none; see `Asker`."""
        numbered = self._show(question, options, default, back)
        while True:
            typed = self._line(strings.PLAIN_NUMBERS.format(count=len(numbered)))
            if not typed:
                return list(default)
            words = typed.replace(",", " ").split()
            if words == ["0"]:
                return []
            if all(w.isdecimal() and 1 <= int(w) <= len(numbered) for w in words):
                picked = [numbered[int(w) - 1][0] for w in words]
                return [BACK] if BACK in picked else picked

    def text(self, question: str, default: str, check: Check, back: bool, path: bool = False) -> str:
        """Takes a line; an empty one takes the default; see `Asker`."""
        message = question + (strings.BACK_HINT if back else "") + (f" [{default}]" if default else "")
        while True:
            typed = self._line(message) or default
            if back and typed == "<":
                return BACK
            wrong = check(typed)
            if wrong is None:
                return typed
            self.tell(wrong)

    def tell(self, text: str) -> None:
        """Shows a sentence."""
        print(text, file=self._screen)
