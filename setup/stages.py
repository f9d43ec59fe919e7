"""Runs one stage: its process, its events on the way to events.jsonl and the display, its failure explained."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparktune.setup import strings
from sparktune.setup.machine.backends import Backend, StopSignals
from sparktune.setup.machine.diagnose import diagnose
from sparktune.setup.plan.errors import ExitCode, SparktuneError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.progress import Display
from sparktune.setup.runstate import RunLock
from sparktune.setup.trackers import open_tracking

__all__ = ["StageFailed", "StageRunner"]

_LOG_TAIL_LINES = 15
_KILLED = 137
_ASKED_TO_END = frozenset(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
"""Codes of a stage that such a signal met before it could answer: while Python was still starting, say."""


class StageFailed(SparktuneError):
    """A stage ended with another code than 0; what there is to say has been said."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(f"the stage {stage} ended with exit code {code}")
        self.stage = stage
        self.code = code


class _Tail:
    """Follows a file that a stage appends to, from where it ends now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._start = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields the events written since the last call; a line still being written waits."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = self._path.open("rb")
            self._file.seek(self._start)
        lines = (self._rest + self._file.read()).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"kind": "message", "level": "warning", "text": f"unreadable event in {self._path}"}
            if isinstance(event, dict):
                yield event

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class StageRunner:
    """Runs single stages of one run, each as a process of its backend."""

    def __init__(
        self, plan: Plan, run: RunDir, backend: Backend, display: Display, stop: StopSignals, lock: RunLock
    ) -> None:
        self.plan, self.run, self.backend = plan, run, backend
        self.display, self.stop, self.lock = display, stop, lock

    def stage(self, stage: str, number: int, count: int) -> float:
        """Runs one stage and returns its seconds.

        Raises:
            StageFailed: its exit code was not 0. The reason and the last log lines have been shown.
        """
        self.run.stage_events(stage).parent.mkdir(parents=True, exist_ok=True)
        tail = _Tail(self.run.stage_events(stage))
        errors: list[str] = []
        log_start = self.run.log.stat().st_size if self.run.log.exists() else 0
        tracking = open_tracking(self.plan, self.run, self.display.say, stage)
        self.display.begin(stage, number, count)
        begun, code = time.monotonic(), int(ExitCode.INTERRUPTED)
        with self.run.events.open("a", encoding="utf-8") as events:

            def poll() -> None:
                self.display.tick()
                for event in tail.read():
                    events.write(json.dumps(event, ensure_ascii=False) + "\n")
                    events.flush()
                    tracking.event(event)
                    if event.get("kind") == "message" and event.get("level") == "error":
                        errors.append(str(event.get("text", "")))  # shown below, when the bar is gone
                    else:
                        self.display.event(event)

            try:
                code = self.backend.run_stage(
                    stage, self.run, self.plan, on_poll=poll, stop=self.stop, lock_fd=self.lock.fd
                )
                if code in _ASKED_TO_END or (self.stop.count and code not in (ExitCode.OK, ExitCode.STOPPED)):
                    code = int(ExitCode.INTERRUPTED)
                poll()
            finally:
                tail.close()
                seconds = time.monotonic() - begun
                self.display.end(stage, seconds, code)
                tracking.finish(code == ExitCode.OK)
        if code != ExitCode.OK:
            self._explain(stage, code, errors, log_start)
            raise StageFailed(stage, code)
        return seconds

    def _explain(self, stage: str, code: int, errors: list[str], log_start: int) -> None:
        for text in errors:
            self.display.say(text, "warning" if code in (ExitCode.STOPPED, ExitCode.INTERRUPTED) else "error")
        if code in (ExitCode.STOPPED, ExitCode.INTERRUPTED):
            return
        with self.run.log.open("rb") as log:
            log.seek(log_start)
            text = log.read().decode("utf-8", errors="replace")
        if not errors or code not in set(ExitCode) - {ExitCode.FAILURE}:
            self.display.say(strings.LOG_TAIL.format(stage=stage, code=code, log=self.run.log), "error")
            for line in text.splitlines()[-_LOG_TAIL_LINES:]:
                self.display.say("    " + line)
        if code == _KILLED:
            self.display.say(strings.KILLED, "error")
        for finding in diagnose("\n".join([*errors, text])):
            self.display.say(strings.KNOWN_FAILURE.format(sentence=finding.sentence()), "warning")
