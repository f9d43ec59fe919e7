"""How a question is put: with questionary on a capable terminal, as numbered lines with `--plain` or TERM=dumb.

Prompts appear on standard error, so that standard output carries data only. What a screen shows beside its question
goes through `show`, to the same stream.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import questionary
from prompt_toolkit.completion import PathCompleter
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.output.defaults import create_output
from rich.console import Console, RenderableType
from rich.text import Text

from sparktune.setup import strings
from sparktune.setup.plan.untrusted import printable
from sparktune.setup.terminal import Terminal

__all__ = ["BACK", "Asker", "Option", "PlainAsker", "TerminalAsker", "plain_text"]

BACK = "\0back"
"""What a question returns when the user wants the one before."""
_POINTER = 6
"""Columns that the list's pointer and margin take."""
_ESCAPE_S = 0.2
"""How long a lone Escape waits for the rest of an arrow key's sequence."""
_PLAIN_WIDTH = 100
Shown = str | list[tuple[str, str]]
Option = tuple[str, Shown]
"""(value, what is shown: a text, or parts of it as (style class, text))."""
Check = Callable[[str], str | None]
"""Takes a typed text and returns what is wrong with it, or None."""

_STYLE = questionary.Style([
    ("qmark", "fg:ansicyan bold"), ("question", "bold"), ("answer", "fg:ansicyan bold"),
    ("pointer", "fg:ansicyan bold"), ("highlighted", "bold"), ("selected", "noreverse"),
    ("instruction", "fg:ansibrightblack"), ("good", "fg:ansigreen"), ("tight", "fg:ansiyellow"), ("bad", "fg:ansired"),
    ("faint", "fg:ansibrightblack"),
])


def plain_text(shown: Shown) -> str:
    """Returns an option's text without its styles."""
    return shown if isinstance(shown, str) else "".join(text for _, text in shown)


def _cut(shown: Shown, width: int) -> Shown:
    """Returns what fits into one line: a list whose lines wrap cannot be read."""
    text = plain_text(shown)
    if len(text) <= width:
        return shown
    if isinstance(shown, str):
        return text[: max(width - 1, 1)] + "…"
    parts, left = [], max(width - 1, 1)
    for style, part in shown:
        if left > 0:
            parts.append((style, part[:left]))
        left -= len(part)
    return [*parts, ("", "…")]


class Asker(Protocol):
    """Asks one question. Ctrl-C raises KeyboardInterrupt, and so does the end of the input."""

    def choose(self, question: str, options: Sequence[Option], default: str | None, back: bool) -> str:
        """Returns the value of one option, or BACK."""

    def choose_many(self, question: str, options: Sequence[Option], default: Sequence[str], back: bool) -> list[str]:
        """Returns the values of any number of options, or [BACK]."""

    def text(self, question: str, default: str, check: Check, back: bool, paths: str | None = None) -> str:
        """Returns a text that `check` accepts, or BACK for a lone `<`.

        Args:
            paths: what Tab completes: "files" (folders and JSONL files), "folders", or None for nothing.
        """

    def tell(self, text: str, whole: bool = False) -> None:
        """Shows a sentence; `whole` leaves its lines as they are, for a command that is there to be copied."""

    def show(self, what: RenderableType) -> None:
        """Shows a table or another part of the screen."""

    @property
    def width(self) -> int:
        """Columns of the screen."""

    @property
    def height(self) -> int:
        """Rows of the screen."""

    @property
    def colours(self) -> bool:
        """Whether colour can be seen, so that it may carry meaning."""


def _screen_console(file: TextIO | None = None) -> Console:
    return Terminal(stderr=file is None, file=file)


class TerminalAsker:
    """Arrow keys, completion of paths, checks while typing; Escape goes back, and so does the left arrow in a list.

    Args:
        keys: where key presses come from; the terminal when left out.
        screen: where prompts appear; standard error when left out.
        console: where `tell` and `show` write; standard error when left out.
    """

    def __init__(self, keys: Input | None = None, screen: Output | None = None, console: Console | None = None) -> None:
        self._io: dict[str, Any] = {"output": screen or create_output(stdout=sys.stderr), "style": _STYLE}
        if keys is not None:
            self._io["input"] = keys
        self._console = console or _screen_console()
        if self._console.no_color:
            self._io["color_depth"] = ColorDepth.DEPTH_1_BIT

    def _ask(self, question: questionary.Question, *back_keys: str) -> Any:
        """Runs one prompt; `back_keys` end it with BACK."""
        application = question.application
        application.ttimeoutlen = _ESCAPE_S
        bindings = KeyBindings()

        def go_back(event: KeyPressEvent) -> None:
            event.app.exit(result=BACK)

        for key in back_keys:
            bindings.add(key, eager=True)(go_back)
        application.key_bindings = merge_key_bindings([application.key_bindings or KeyBindings(), bindings])
        try:
            return question.unsafe_ask()
        except EOFError:
            raise KeyboardInterrupt from None  # the terminal is gone, or Ctrl-D: nobody is left to answer

    def choose(self, question: str, options: Sequence[Option], default: str | None, back: bool) -> str:
        """Shows the options as a list; see `Asker`."""
        width = self.width - _POINTER
        choices: list[Any] = [questionary.Choice(_cut(shown, width), value=value) for value, shown in options]
        if back:
            choices.append(questionary.Choice(strings.BACK, value=BACK))
        first = default if default in {c.value for c in choices} else choices[0].value
        keys = strings.KEYS_BACK if back else strings.KEYS
        asked = questionary.select(question, choices=choices, default=first, instruction=keys, **self._io)
        return str(self._ask(asked, *(("escape", "left") if back else ())))

    def choose_many(self, question: str, options: Sequence[Option], default: Sequence[str], back: bool) -> list[str]:
        """Shows the options with boxes to tick; see `Asker`."""
        width = self.width - _POINTER
        choices: list[Any] = [
            questionary.Choice(_cut(shown, width), value=value, checked=value in default) for value, shown in options
        ]
        if back:
            choices.append(questionary.Choice(strings.BACK, value=BACK))
        asked = questionary.checkbox(question, choices=choices, instruction=strings.KEYS_MANY, **self._io)
        picked = self._ask(asked, *(("escape", "left") if back else ()))
        return [BACK] if picked == BACK or BACK in picked else list(picked)

    def text(self, question: str, default: str, check: Check, back: bool, paths: str | None = None) -> str:
        """Takes a line; see `Asker`."""

        def accept(typed: str) -> bool | str:
            return (back and typed.strip() == "<") or check(typed.strip()) or True

        completer = None
        if paths is not None:
            completer = PathCompleter(
                only_directories=paths == "folders", expanduser=True,
                file_filter=lambda name: os.path.isdir(name) or Path(name).suffix in (".jsonl", ".json", ".ndjson"),
            )
        asked = questionary.text(
            question, default=default, validate=accept, instruction=strings.BACK_HINT if back else None,
            completer=completer, complete_while_typing=False, validate_while_typing=False, **self._io,
        )
        typed = str(self._ask(asked, *(("escape",) if back else ()))).strip()
        return BACK if typed == BACK or (back and typed == "<") else typed

    def tell(self, text: str, whole: bool = False) -> None:
        """Shows a sentence on standard error; see `Asker`."""
        self._console.print(Text(text), soft_wrap=whole)

    def show(self, what: RenderableType) -> None:
        """Shows a part of the screen on standard error."""
        self._console.print(what)

    @property
    def width(self) -> int:
        """Columns of the screen."""
        return int(self._io["output"].get_size().columns)

    @property
    def height(self) -> int:
        """Rows of the screen."""
        return int(self._io["output"].get_size().rows)

    @property
    def colours(self) -> bool:
        """Whether colour can be seen."""
        return self._console.color_system is not None and not self._console.no_color


class PlainAsker:
    """Numbered lines and plain reading: for dumb terminals, screen readers and logs.

    Args:
        keys: where answers come from.
        screen: where questions appear.
    """

    def __init__(self, keys: TextIO | None = None, screen: TextIO | None = None) -> None:
        self._keys = keys or sys.stdin
        self._screen = screen or sys.stderr
        measured = Terminal(file=self._screen)
        self._console = Terminal(
            file=self._screen, no_color=True, force_terminal=False, highlight=False,
            width=measured.width if measured.is_terminal else _PLAIN_WIDTH,
        )

    def _line(self, prompt: str) -> str:
        print(printable(prompt), end=" ", file=self._screen, flush=True)
        line = self._keys.readline()
        if not line:
            raise KeyboardInterrupt  # end of input: nobody is left to answer
        return line.strip()

    def _show(self, question: str, options: Sequence[Option], marked: Sequence[str], back: bool) -> list[Option]:
        numbered = [*options, *([(BACK, strings.BACK)] if back else [])]
        self.tell(question)
        for number, (value, shown) in enumerate(numbered, 1):
            self.tell(f"  {number}. {plain_text(shown)}{' *' if value in marked else ''}")
        return numbered

    def choose(self, question: str, options: Sequence[Option], default: str | None, back: bool) -> str:
        """Takes a number; an empty line takes the starred option; see `Asker`."""
        if default not in {value for value, _ in options}:
            default = options[0][0]
        numbered = self._show(question, options, [default or ""], back)
        while True:
            typed = self._line(strings.PLAIN_NUMBER.format(count=len(numbered)))
            if not typed and default is not None:
                return default
            if back and typed == "<":
                return BACK
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
            if back and words == ["<"]:
                return [BACK]
            if all(w.isdecimal() and 1 <= int(w) <= len(numbered) for w in words):
                picked = [numbered[int(w) - 1][0] for w in words]
                return [BACK] if BACK in picked else picked

    def text(self, question: str, default: str, check: Check, back: bool, paths: str | None = None) -> str:
        """Takes a line; an empty one takes the default; see `Asker`."""
        message = question + (f" {strings.BACK_HINT}" if back else "") + (f" [{default}]" if default else "")
        while True:
            typed = self._line(message) or default
            if back and typed == "<":
                return BACK
            wrong = check(typed)
            if wrong is None:
                return typed
            self.tell(wrong)

    def tell(self, text: str, whole: bool = False) -> None:
        """Shows a sentence; its lines are left as they are."""
        print(printable(text), file=self._screen)

    def show(self, what: RenderableType) -> None:
        """Shows a part of the screen, without colour."""
        self._console.print(what)

    @property
    def width(self) -> int:
        """Columns of the screen."""
        return self._console.width

    @property
    def height(self) -> int:
        """Without an end: lines scroll."""
        return sys.maxsize

    @property
    def colours(self) -> bool:
        """Never: plain lines carry no colour."""
        return False
