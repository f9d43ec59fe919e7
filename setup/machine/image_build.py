"""Builds an image as a child process: through BuildKit's command line where it is, else through the SDK's stream.

Both speak the same progress events. A child, because ending it is what cancels a build in the engine at once.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sparktune.setup.machine.diagnose import Finding, diagnose
from sparktune.setup.plan.errors import ExitCode, SparktuneError
from sparktune.setup.plan.rundir import cache_dir

__all__ = ["BuildFailed", "BuildRequest", "Cancelled", "Progress", "build", "builder_command", "steps_of"]

_TAIL_LINES = 30
_POLL_S = 0.2
_CANCEL_S = 20.0
_VERTEX = re.compile(r"^#(\d+) (\[[^\]]+\] .*)$")
_OUTPUT = re.compile(r"^#(\d+) [\d.]+ (.*)$")
_FINISHED = re.compile(r"^#(\d+) (CACHED|DONE [\d.]+s|ERROR.*)$")
_LEGACY_STEP = re.compile(r"^Step (\d+)/(\d+) : (.*)$")


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build."""

    context: Path
    """The checkout."""
    dockerfile: str
    """Relative to the context."""
    tag: str
    build_args: dict[str, str]
    network: str
    no_cache: bool = False
    log: Path
    """Everything the build says."""


class BuildFailed(SparktuneError):
    """A build step failed: which, its last lines, and what they are known for."""

    def __init__(self, step: str, tail: list[str], findings: list[Finding], log: Path) -> None:
        known = "\n".join(f"  {finding.sentence()}" for finding in findings if not finding.warning)
        super().__init__(
            f"The image was not built: it failed at `{step}`.\n"
            + (f"{known}\n" if known else "Nothing in the log is a known failure.\n")
            + "\n".join(f"    {line}" for line in tail) + f"\nThe whole log is in {log}."
        )
        self.step, self.tail, self.findings = step, tail, findings


class Cancelled(SparktuneError):
    """The build was stopped on request; nothing was tagged."""

    exit_code = ExitCode.INTERRUPTED


def builder_command(request: BuildRequest) -> tuple[str, list[str], dict[str, str]]:
    """Returns (name, argument list, environment) of the best builder here.

    `buildx` where the client has the plugin; `buildkit` where a client of before 23 has it built in; else `sdk`.
    """
    env = dict(os.environ)
    arguments = ["--progress=plain", "--network", _cli_network(request.network), "-f",
                 str(request.context / request.dockerfile), "-t", request.tag]
    for key, value in sorted(request.build_args.items()):
        arguments += ["--build-arg", f"{key}={value}"]
    if request.no_cache:
        arguments.append("--no-cache")
    for client in _clients():
        if _answers([client, "buildx", "version"]):
            return "buildx", [client, "buildx", "build", "--load", *arguments, str(request.context)], env
    for client in _clients():
        done = subprocess.run([client, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"version (\d+)\.", done.stdout)
        if version and 19 <= int(version[1]) < 23:  # from 23 on the client asks for the plugin, and fails without it
            return "buildkit", [client, "build", *arguments, str(request.context)], {**env, "DOCKER_BUILDKIT": "1"}
    payload = {"path": str(request.context), "dockerfile": request.dockerfile, "tag": request.tag,
               "buildargs": request.build_args, "nocache": request.no_cache, "network_mode": request.network}
    argv = [sys.executable, "-P", "-m", "sparktune.setup.machine.image_stream", json.dumps(payload)]
    return "sdk", argv, {**env, "PYTHONUNBUFFERED": "1"}


def _cli_network(network: str) -> str:
    return "default" if network == "bridge" else network


def _clients() -> list[str]:
    """Returns every `docker` on PATH, in its order."""
    found = []
    for folder in os.get_exec_path():
        path = shutil.which("docker", path=folder)
        if path and path not in found:
            found.append(path)
    return found


def _answers(argv: list[str]) -> bool:
    try:
        return subprocess.run(argv, capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def steps_of(dockerfile: Path) -> int:
    """Counts the steps that BuildKit reports: every RUN, COPY and WORKDIR, and each base once."""
    text = dockerfile.read_text(encoding="utf-8")
    bases = set(re.findall(r"^FROM\s+(\S+)", text, flags=re.M))
    return len(bases) + len(re.findall(r"^(?:RUN|COPY|WORKDIR)\s", text, flags=re.M))


@dataclass
class Progress:
    """Follows a build's output, in either form, and estimates what remains from earlier builds."""

    total: int
    on_event: Callable[[dict[str, Any]], None]
    history: dict[str, float] = field(default_factory=dict)
    """Step -> seconds it took in an earlier build."""
    step: str = ""
    last: str = ""
    error: str = ""
    tail: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Step -> seconds it took now."""
    done: int = 0
    _begun: float = field(default_factory=time.monotonic)
    _vertices: dict[str, tuple[str, float]] = field(default_factory=dict)
    _finished: set[str] = field(default_factory=set)

    def feed(self, line: str) -> None:
        """Takes one line of `--progress=plain`, or one JSON line of the SDK's stream."""
        if line.startswith("{"):
            self._feed_legacy(line)
        else:
            self._feed_buildkit(line)
        self.emit()

    def emit(self) -> None:
        """Sends the state as one event."""
        self.on_event({
            "kind": "progress", "phase": self.step or "sending the build context", "done": min(self.done, self.total),
            "total": self.total, "unit": "steps", "elapsed_s": round(time.monotonic() - self._begun, 1),
            "remaining_s": self._remaining(), "last": self.last,
        })

    def _remaining(self) -> float | None:
        if not self.history:
            return None
        left = sum(s for step, s in self.history.items() if step not in self.seconds)
        begun = next((begun for step, begun in self._vertices.values() if step == self.step), None)
        if begun is not None and self.step not in self.seconds:
            left -= min(time.monotonic() - begun, self.history.get(self.step, 0.0))
        return round(left, 1)

    def _line(self, text: str) -> None:
        for part in text.replace("\r", "\n").splitlines():
            if part.strip():
                self.last = part.strip()
                self.tail = [*self.tail[-_TAIL_LINES + 1:], part.rstrip()]

    def _finish(self, step: str, begun: float) -> None:
        self.seconds[step] = time.monotonic() - begun
        self.done += 1

    def _feed_buildkit(self, line: str) -> None:
        if match := _FINISHED.match(line):
            number, word = match[1], match[2]
            if number in self._vertices and number not in self._finished:
                self._finished.add(number)
                self._finish(*self._vertices[number])
            if word.startswith("ERROR"):
                self.step = self._vertices.get(number, (self.step, 0.0))[0]
                self._line(word)
        elif match := _VERTEX.match(line):
            if match[1] not in self._vertices and "[internal]" not in match[2]:
                self._vertices[match[1]] = (match[2], time.monotonic())
                self.step = match[2]
        elif match := _OUTPUT.match(line):
            self._line(match[2])
        elif line.strip() and not line.startswith("#"):
            self._line(line)

    def _feed_legacy(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            self._line(line)
            return
        text = str(entry.get("stream", ""))
        if match := _LEGACY_STEP.match(text.strip()):
            now = time.monotonic()
            if self.step:
                self._finish(self.step, self._vertices.get("legacy", ("", now))[1])
            self.total, self.step = int(match[2]), match[3]
            self._vertices["legacy"] = (match[3], now)
        elif text.strip():
            self._line(text)
        elif "status" in entry:
            self._line(" ".join(str(entry.get(k, "")) for k in ("id", "status", "progress")).strip())
        if "error" in entry:  # the stream raises nothing: this line is the only sign
            self.error = str(entry["error"])
            self._line(self.error)


def _history_file(request: BuildRequest) -> Path:
    return cache_dir("images") / f"seconds-{Path(request.dockerfile).name}.json"


def _history(request: BuildRequest) -> dict[str, float]:
    try:
        return {str(k): float(v) for k, v in json.loads(_history_file(request).read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}  # an estimate's source; without one there is no estimate


def _reader(stream: IO[bytes], lines: queue.Queue[str | None]) -> None:
    for raw in stream:
        lines.put(raw.decode("utf-8", "replace").rstrip("\n"))
    lines.put(None)


def build(
    request: BuildRequest, on_event: Callable[[dict[str, Any]], None], should_stop: Callable[[], bool] = lambda: False
) -> str:
    """Builds the image and returns the builder's name.

    Args:
        request: what to build.
        on_event: takes progress events: phase, done, total, elapsed_s, remaining_s (None at the first build), last.
        should_stop: asked several times a second; True cancels.

    Raises:
        BuildFailed: a step failed, or the engine went away.
        Cancelled: `should_stop` said so. Nothing was tagged and nothing runs.
    """
    name, argv, env = builder_command(request)
    progress = Progress(
        total=steps_of(request.context / request.dockerfile), on_event=on_event, history=_history(request)
    )
    on_event({"kind": "choice", "what": "builder", "chosen": name, "reason": "the best one that this machine has"})
    request.log.parent.mkdir(parents=True, exist_ok=True)
    lines: queue.Queue[str | None] = queue.Queue()
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env,
        start_new_session=True,
    )
    assert process.stdout is not None  # asked for above
    reader = threading.Thread(target=_reader, args=(process.stdout, lines), daemon=True)
    reader.start()
    try:
        _follow(process, lines, progress, request.log, should_stop)
    except BaseException:
        _cancel(process)
        raise
    finally:
        reader.join(timeout=5)
        process.stdout.close()
    if process.wait() != 0 or progress.error:
        text = request.log.read_text(encoding="utf-8", errors="replace")
        raise BuildFailed(progress.step or "sending the build context", progress.tail, diagnose(text), request.log)
    took = {step: seconds for step, seconds in progress.seconds.items() if seconds > 1.0}
    if took:  # a build from the cache tells nothing about how long a real one takes
        _history_file(request).write_text(json.dumps({**progress.history, **took}), encoding="utf-8")
    return name


def _follow(
    process: subprocess.Popen[bytes], lines: queue.Queue[str | None], progress: Progress, log: Path,
    should_stop: Callable[[], bool],
) -> None:
    with log.open("w", encoding="utf-8") as out:
        while True:
            if should_stop():
                raise Cancelled("The image build was stopped. Nothing was tagged; finished steps are kept.")
            try:
                line = lines.get(timeout=_POLL_S)
            except queue.Empty:
                progress.emit()
                continue
            if line is None:
                return
            out.write(line + "\n")
            out.flush()
            progress.feed(line)


def _cancel(process: subprocess.Popen[bytes]) -> None:
    for number, wait_s in ((signal.SIGINT, _CANCEL_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=wait_s)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue
