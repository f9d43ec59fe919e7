"""The push to the hub, by the real client, into a hub of our own on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from sparktune.setup.export import push as push_module
from sparktune.setup.export.push import main, plan_uploads
from sparktune.setup.plan.config import save_plan
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.schema import Plan

TOKEN = "hf_" + "test" * 8


class Hub(ThreadingHTTPServer):
    """Takes repositories, large files and commits, as the hub's API does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _reply(self, body: Any, code: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._reply({"error": "no"}, 401)
        name = self.path.removeprefix("/api/models/").split("/")
        return self._reply({"id": "/".join(name[:2]), "sha": "0" * 40, "siblings": [], "private": True, "tags": []})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        hub.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._reply({"error": "no"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            private = asked.get("private", asked.get("visibility") == "private")
            hub.repositories[f"{asked['organization']}/{asked['name']}"] = private
            return self._reply({"url": f"{hub.url}/{asked['organization']}/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            return self._reply({"errors": [], "warnings": []})
        if self.path.endswith("/objects/batch"):
            asked = json.loads(body)
            return self._reply({"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{hub.url}/store/{o['oid']}", "header": {}}}}
                for o in asked["objects"]]})
        if "/preupload/" in self.path:
            return self._reply({"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".gguf")) else "regular",
                 "shouldIgnore": False} for f in json.loads(body)["files"]]})
        if "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            kept = hub.files.setdefault(name, {})
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    kept[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    kept[value["path"]] = hub.objects[value["oid"]]
            return self._reply({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40})
        return self._reply({"error": f"unexpected {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: real(endpoint=server.url, token=token))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with small stand-ins for its weights: only names and bytes matter here."""
    root, output = tmp_path / "results" / "r", tmp_path / "output"
    root.mkdir(parents=True)
    save_plan(Plan(model="a/b", output=output, results=root.parent, mtp="skip"), root / "plan.yaml")
    for folder, names in (("r", ["README.md", "config.json", "model.safetensors", ".sparktune-merge.json"]),
                          ("r-gguf", ["r-Q8_0.gguf", "manifest.json"])):
        (output / folder).mkdir(parents=True)
        for name in names:
            (output / folder / name).write_bytes(f"{folder}/{name}\n".encode() * 50)
    return root


def token_file(folder: Path, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(mode)
    return path


def test_everything_is_shown_and_nothing_sent_without_yes(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(run), "--push-to", "me/sums", "--token-file", str(token_file(tmp_path))]) == 0
    shown = capsys.readouterr()
    for word in ("me/sums (private)", "me/sums-GGUF (private)", "model.safetensors", "r-Q8_0.gguf", "| r/README.md"):
        assert word in shown.out
    assert "Add --yes" in shown.err
    assert TOKEN not in shown.out + shown.err
    assert ".sparktune" not in shown.out
    assert hub.requests == []


def test_a_confirmed_push_arrives_whole(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--run", str(run), "--push-to", "me/sums", "--token-file", str(token_file(tmp_path)), "--yes"]
    assert main(asked) == 0
    assert hub.repositories == {"me/sums": True, "me/sums-GGUF": True}
    output = run.parents[1] / "output"
    for name, folder in (("me/sums", "r"), ("me/sums-GGUF", "r-gguf")):
        sent = {k: v for k, v in hub.files[name].items() if k != ".gitattributes"}
        here = {p.name: p.read_bytes() for p in (output / folder).iterdir() if not p.name.startswith(".")}
        assert sent == here
    large = (output / "r" / "model.safetensors").read_bytes()
    assert hub.objects[hashlib.sha256(large).hexdigest()] == large
    said = capsys.readouterr()
    assert f"{hub.url}/me/sums/commit/1" in said.out
    assert TOKEN not in said.out + said.err


def test_a_refused_token_is_a_sentence(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("hf_" + "wrong" * 6)
    wrong.chmod(0o600)
    assert main(["--run", str(run), "--push-to", "me/sums", "--token-file", str(wrong), "--yes"]) == 3
    said = capsys.readouterr()
    assert "The hub refused me/sums (HTTP 401)" in said.err
    assert "wrong" * 6 not in said.out + said.err
    assert hub.files == {}


def test_what_cannot_be_pushed_is_refused_before_anything(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in ("sums", "me/../x", "-x/y", "a/b/c"):
        with pytest.raises(UsageError, match="OWNER/NAME"):
            plan_uploads(run, target, ["merged"])
    with pytest.raises(UsageError, match="got 'adapter'"):
        plan_uploads(run, "me/sums", ["adapter"])
    with pytest.raises(UsageError, match="nothing of mtp yet"):
        plan_uploads(run, "me/sums", ["mtp"])
    with pytest.raises(UsageError, match=r"no.*plan\.yaml|there is none"):
        plan_uploads(tmp_path, "me/sums", ["merged"])
    assert main(["--run", str(run), "--push-to", "me/sums", "--token-file", str(token_file(tmp_path, 0o644))]) == 2
    assert "may be read by others" in capsys.readouterr().err
    with pytest.raises(UsageError, match="cannot be read"):
        push_module._token(tmp_path / "none")
    assert hub.requests == []
