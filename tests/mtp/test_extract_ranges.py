"""Extraction over HTTP: the index first, then the head's bytes and no others where the server serves ranges."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparktune.setup.demo_model import make_model
from sparktune.setup.plan.weights import safetensors_index


class Hub(ThreadingHTTPServer):
    """A hub with one model, `some/model`; `ranges` says whether it serves parts of files."""

    def __init__(self, folder: Path, ranges: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.cut = folder, ranges, False
        self.sent: dict[str, int] = {}
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        name = self.path.split("?")[0].rpartition("/")[2]
        file = self.server.folder / name
        if not self.path.startswith("/some/model/resolve/main/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        total, begin, end = len(data), 0, len(data)
        asked = self.headers.get("Range")
        if asked and self.server.ranges:
            low, _, high = asked.removeprefix("bytes=").partition("-")
            begin, end = int(low), min(int(high) + 1 if high else total, total)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if self.server.cut and begin:  # a proxy that ends too early and says nothing
            end -= 1
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if body:
            self.server.asked.append(name)
            try:
                self.wfile.write(data[begin:end])
            except (BrokenPipeError, ConnectionResetError):
                return  # a client that saw 200 where it asked for a part hangs up
            self.server.sent[name] = self.server.sent.get(name, 0) + end - begin

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("hub") / "model", vocab_size=512)


@pytest.fixture
def hub(folder: Path, request: pytest.FixtureRequest) -> Iterator[Hub]:
    server = Hub(folder, request.param)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def extract(hub: Hub, tmp_path: Path, model: str = "some/model") -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path / "out" / "head.safetensors"
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"),
           "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "sparktune.mtp.extract_upstream_mtp", "--model", model, "--out", str(out)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120), out


def is_the_head(out: Path, folder: Path) -> bool:
    held = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items() if n.startswith("mtp.")}
    found = load_file(out)
    return found.keys() == held.keys() and all(torch.equal(found[n], held[n]) for n in held)


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_only_the_heads_bytes_travel(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done, out = extract(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert is_the_head(out, folder)
    index = safetensors_index(folder)
    holders = {f.name for n, f in index.items() if n.startswith("mtp.")}
    assert len(holders) < len(set(index.values()))
    assert hub.asked[:2] == ["config.json", "model.safetensors.index.json"]
    assert {n for n in hub.asked if n.endswith(".safetensors")} == holders
    size = sum(t.nbytes for t in load_file(out).values())
    # the header of each shard is looked for in its first MiB
    assert sum(hub.sent[n] for n in holders) <= size + len(holders) * 2**20
    assert sum(hub.sent[n] for n in holders) < sum((folder / n).stat().st_size for n in holders)
    assert [p.name for p in out.parent.iterdir()] == ["head.safetensors"]


@pytest.mark.parametrize("hub", [False], indirect=True)
def test_a_server_without_ranges_gives_whole_shards(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done, out = extract(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was read whole" in done.stdout
    assert is_the_head(out, folder)
    holders = {f.name for n, f in safetensors_index(folder).items() if n.startswith("mtp.")}
    assert {n for n in hub.asked if n.endswith(".safetensors")} == holders
    assert [p.name for p in out.parent.iterdir()] == ["head.safetensors"]


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_a_cut_answer_and_a_missing_model_leave_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.cut = True
    done, out = extract(hub, tmp_path)
    assert done.returncode == 3, done.stdout
    assert "Try again." in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.parent.iterdir())
    done, out = extract(hub, tmp_path, "other/model")
    assert done.returncode in (2, 3)
    assert "other/model" in done.stderr
    assert "Traceback" not in done.stderr
