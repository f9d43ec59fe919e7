"""The base is held to its digest, against a real registry on this machine."""

from __future__ import annotations

import io
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.machine.image import Stack, prepare_base
from sparktune.setup.plan.errors import PreflightError

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800), pytest.mark.xdist_group("docker-engine")]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Debian's docker-registry on a free port; yields host:port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path}/registry\n"
        f"http:\n  addr: 127.0.0.1:{port}\n",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        ["/usr/bin/docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=2).close()
            break
        except OSError:
            time.sleep(0.1)
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=20)


def push(client: Any, name: str, content: bytes) -> None:
    """Puts an image that holds one file under `name`, and leaves none in the engine."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("file")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    repository, _, tag = name.rpartition(":")
    client.api.import_image_from_data(packed.getvalue(), repository=repository, tag=tag)
    answer = client.images.push(repository, tag=tag)
    assert "errorDetail" not in answer, answer
    client.images.remove(name, force=True)


def test_a_moved_tag_is_refused_and_the_first_one_recorded(client: Any, registry: str) -> None:
    name = f"{registry}/base:1"
    stack = Stack(name="test", base_image=name, base_digest=None)
    events: list[dict[str, Any]] = []
    push(client, name, b"first")
    first = prepare_base(client, stack, events.append)
    assert first.startswith("sha256:")
    assert any(first in str(e.get("text")) for e in events)
    assert prepare_base(client, stack, events.append) == first

    client.images.remove(name, force=True)
    push(client, name, b"second")
    with pytest.raises(PreflightError, match="should have the digest") as refused:
        prepare_base(client, stack, events.append)
    assert first in str(refused.value)

    pinned = Stack(name="test", base_image=name, base_digest="sha256:" + "0" * 64)
    with pytest.raises(PreflightError, match=r"stack\.yaml"):
        prepare_base(client, pinned, events.append)
    client.images.remove(name, force=True)


def test_a_base_that_nobody_has_is_named(client: Any, registry: str) -> None:
    stack = Stack(name="test", base_image=f"{registry}/nothing:1", base_digest=None)
    with pytest.raises(PreflightError, match="could not be pulled"):
        prepare_base(client, stack, lambda event: None)
