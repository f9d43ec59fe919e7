"""A llama-server of our own for the length of a `with` block: token ids in, greedy token ids out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktune.setup.export.llama_build import Tools
from sparktune.setup.plan.errors import SparktuneError

__all__ = ["Completion", "LlamaServer", "llama_server", "llama_threads"]

_START_S = 600
_REQUEST_S = 1800
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One greedy continuation."""

    ids: list[int]
    text: str
    drafted: int
    """Tokens that a draft head proposed; 0 without one."""
    accepted: int
    """Proposed tokens that the model itself would have written."""


def llama_threads() -> int:
    """Returns how many threads llama.cpp's programs get: what the user gave us (OMP_NUM_THREADS), else all cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))


class LlamaServer:
    """A running server. Only this process talks to it: it listens on the loopback interface, on a port of its own."""

    def __init__(self, port: int, said: Callable[[], str]) -> None:
        self._port, self._said = port, said

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_REQUEST_S) as reply:
                answer: dict[str, Any] = json.loads(reply.read())
        except (OSError, ValueError) as error:
            raise SparktuneError(f"llama-server did not answer {path}: {error}. It said: {self._said()}") from error
        return answer

    def ready(self) -> bool:
        """Returns whether the model is loaded."""
        with socket.socket() as probe:
            probe.settimeout(_POLL_S)
            if probe.connect_ex(("127.0.0.1", self._port)):
                return False
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self._port}/health", timeout=_REQUEST_S) as reply:
                return bool(reply.status == 200)
        except (urllib.error.HTTPError, OSError):
            return False

    def tokenize(self, text: str) -> list[int]:
        """Returns llama.cpp's token ids of a text, special tokens recognised, none added."""
        answer = self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": True})
        return [int(i) for i in answer["tokens"]]

    def complete(self, ids: Sequence[int], max_new_tokens: int) -> Completion:
        """Returns the greedy continuation of a prompt, up to the end of the turn.

        Args:
            ids: the prompt's tokens; they enter as they are.
            max_new_tokens: longest answer in tokens.
        """
        answer = self._ask("/completion", {
            "prompt": list(ids), "n_predict": max_new_tokens, "temperature": 0.0, "top_k": 1, "samplers": ["top_k"],
            "repeat_penalty": 1.0, "cache_prompt": False, "return_tokens": True,
        })
        timings = answer.get("timings", {})
        return Completion(ids=[int(i) for i in answer["tokens"]], text=str(answer["content"]).strip(),
                          drafted=int(timings.get("draft_n", 0)), accepted=int(timings.get("draft_n_accepted", 0)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def llama_server(
    tools: Tools, file: Path, *, context: int = 4096, arguments: Sequence[str] = (),
    on_poll: Callable[[], None] = lambda: None,
) -> Iterator[LlamaServer]:
    """Runs llama-server on a GGUF file; it never outlives the block.

    Args:
        tools: the compiled programs.
        file: the model.
        context: tokens of prompt and answer together.
        arguments: more of the server's arguments.
        on_poll: called while the model is loaded.

    Raises:
        SparktuneError: the server ended, or the model was not loaded in time; its last words are in the sentence.
    """
    with tempfile.TemporaryDirectory(prefix="sparktune-server-") as scratch:
        log, port = Path(scratch) / "log", _free_port()

        def said() -> str:
            lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
            return " / ".join((errors or lines)[-3:]) or "nothing"

        command = [
            tools.program("llama-server"), "-m", str(file.resolve()), "--host", "127.0.0.1", "--port", str(port),
            "-c", str(context), "-np", "1", "-t", str(llama_threads()), "--no-webui", "--offline", "--no-warmup",
            *arguments,
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT)
            try:
                server, begun = LlamaServer(port, said), time.monotonic()
                while not server.ready():
                    if process.poll() is not None or time.monotonic() - begun > _START_S:
                        raise SparktuneError(f"llama-server could not load {file.name}: {said()}.")
                    on_poll()
                    time.sleep(_POLL_S)
                yield server
            finally:
                process.kill()
                process.wait()
