"""A real terminal for the tests: tmux draws what a person would see, and types what a person would type."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.ansi import AnsiDecoder
from rich.console import Console

_PATIENCE_S = float(os.environ.get("TERMINAL_PATIENCE_S", "120"))
"""How long a text may take to appear; a machine that does much else wants more."""
ROOT = Path(__file__).resolve().parents[2]


class Terminal:
    """One program in a terminal of a given size.

    Args:
        folder: working directory.
        argv: the program.
        size: columns and rows.
        env: variables on top of the test's own; None removes one.
    """

    def __init__(self, folder: Path, argv: list[str], size: tuple[int, int], env: dict[str, str | None]) -> None:
        self._socket = f"sparktune-{uuid.uuid4().hex[:12]}"
        self.size, self._folder = size, folder
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SPARKTUNE_") and k not in ("CI", "TMUX")}
        merged = {**clean, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", **env}
        self._env = {k: v for k, v in merged.items() if v is not None}
        # the shell outlives a Ctrl-C, which the terminal sends to both, and tells the program's exit code
        inner = f"trap : INT; {shlex.join(argv)}; code=$?; echo; echo exit=$code"
        config = folder / "tmux.conf"
        config.write_text(
            "set -g status off\nset -g default-terminal tmux-256color\nset -g history-limit 5000\n"
            "set -s escape-time 20\nset -g remain-on-exit on\n"
        )
        term = [f"TERM={env['TERM']}"] if env.get("TERM") else []
        self._tmux(
            "-f", str(config), "new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), "-c", str(folder),
            "env", *term, "sh", "-c", inner,
        )

    def _tmux(self, *words: str) -> str:
        return subprocess.run(
            ["tmux", "-L", self._socket, *words], env=self._env, capture_output=True, text=True, check=True
        ).stdout

    def screen(self, history: bool = False, colours: bool = False) -> str:
        """Returns what is on the screen, with all that scrolled off it where `history` is asked for."""
        words = ["capture-pane", "-p", *(["-S", "-"] if history else []), *(["-e"] if colours else [])]
        return self._tmux(*words)

    def type(self, text: str) -> None:
        """Types `text` as it is."""
        self._tmux("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        """Presses keys by tmux's names: Enter, Escape, Up, C-c ..."""
        self._tmux("send-keys", *keys)

    def wait(self, text: str, patience_s: float = _PATIENCE_S) -> str:
        """Waits until `text` is on the screen, and returns the screen once it stands still."""
        deadline = time.monotonic() + patience_s
        while text not in (seen := self.screen()):
            assert time.monotonic() < deadline, f"{text!r} did not appear:\n{self.screen(history=True)}"
            time.sleep(0.1)
        while (now := self.screen()) != seen:
            seen = now
            time.sleep(0.15)
        return seen

    def svg(self, title: str) -> str:
        """Returns the screen as a picture."""
        seen = self.screen(colours=True).rstrip("\n")
        # a picture shows nobody's folders
        seen = seen.replace(f"{ROOT}/run.sh", "./run.sh").replace(str(self._folder), "~/chat")
        seen = seen.replace(str(ROOT), "~/sparktune")
        seen = re.split(r"\n\s*exit=\d+", seen)[0]  # what follows is this test's, not the program's
        console = Console(
            record=True, file=io.StringIO(), width=self.size[0], height=self.size[1], force_terminal=True,
            color_system="truecolor", legacy_windows=False,
        )
        for line in AnsiDecoder().decode(seen):  # one decoder: tmux says a style once, also across lines
            console.print(line, no_wrap=True, overflow="crop")
        return console.export_svg(title=title, unique_id=re.sub(r"[^a-z0-9]", "-", title.lower()))

    def close(self) -> None:
        """Ends the terminal and what runs in it."""
        subprocess.run(["tmux", "-L", self._socket, "kill-server"], env=self._env, capture_output=True, check=False)


Opener = Callable[..., Terminal]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Opener]:
    """Opens terminals with the program in them; all are closed at the end."""
    if shutil.which("tmux") is None:
        pytest.fail("These tests draw a real terminal with tmux; install it (apt-get install tmux).")
    opened: list[Terminal] = []

    def open_terminal(
        *arguments: str, folder: Path | None = None, size: tuple[int, int] = (100, 40),
        env: dict[str, str | None] | None = None, argv: list[str] | None = None,
    ) -> Terminal:
        place = folder or tmp_path
        known: dict[str, str | None] = {
            "XDG_CACHE_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})
        }
        words = argv or [sys.executable, "-P", "-m", "sparktune.setup.cli", *arguments]
        opened.append(Terminal(place, words, size, known))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()
