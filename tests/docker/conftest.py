"""A real Docker engine for the tests, started here, and a base image that poses as NVIDIA's, made here.

The engine is Debian's docker.io with its own socket and data folder; no registry and no bridge is needed. The base is
kept in the cache (`stubs`), named by its content, so only the first run on a machine makes it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.machine.engine import connect
from sparktune.setup.plan.rundir import cache_dir

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "docker" / "stub"
BASE = "sparktune-stub-base:test"
DEBIAN = "sparktune-stub-debian:test"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = "python3,python3-pip,python3-venv,python3-dev,gcc,libc6-dev,ca-certificates"


class Engine:
    """A dockerd of the tests' own."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.socket = folder / "docker.sock"
        self.host = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        log = (self.folder / "dockerd.log").open("ab")
        self._process = subprocess.Popen(
            ["/usr/sbin/dockerd", "--iptables=false", "--bridge=none", "-H", self.host, "--data-root", str(self.data),
             "--exec-root", str(self.folder / "exec"), "-p", str(self.folder / "pid")],
            stdout=log, stderr=log, start_new_session=True,
        )
        for _ in range(150):
            if self._process.poll() is not None:
                raise RuntimeError((self.folder / "dockerd.log").read_text()[-2000:])
            if self.docker("version", check=False).returncode == 0:
                return
            time.sleep(0.2)
        raise RuntimeError("dockerd did not answer in 30 s: " + (self.folder / "dockerd.log").read_text()[-2000:])

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends it; what does not end with it (its containerd, after a SIGKILL) is ended by its own process id."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            pid, _, arguments = line.strip().partition(" ")
            if f"{self.folder}/exec" in arguments and "containerd" in arguments:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        # a new containerd waits for the old one's database lock and gives up after 15 s
        shutil.rmtree(self.folder / "exec", ignore_errors=True)
        (self.folder / "pid").unlink(missing_ok=True)

    def docker(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs the command line against this engine."""
        env = {**os.environ, "DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "1"}
        return subprocess.run(
            ["/usr/bin/docker", *arguments], env=env, capture_output=True, text=True, check=check, **options
        )


def _packages() -> None:
    """Installs Debian's engine and debootstrap where they are missing."""
    tools = {"/usr/sbin/dockerd": "docker.io", "/usr/sbin/debootstrap": "debootstrap",
             "/usr/bin/docker-registry": "docker-registry"}
    missing = [package for tool, package in tools.items() if not Path(tool).exists()]
    if missing:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "install", "-y", "-qq", *missing], check=True, env=env, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def engine_parts() -> Iterator[Engine]:
    """The engine, without any image. The data folder is fresh, and removed at the end."""
    assert os.geteuid() == 0, "the tests of the image start a Docker engine, which needs root"
    _packages()
    folder = Path(tempfile.mkdtemp(prefix="sparktune-engine-"))
    engine = Engine(folder, folder / "data")
    engine.start()
    yield engine
    left = engine.docker("ps", "-q", check=False).stdout.split()
    if left:
        engine.docker("rm", "-f", *left)
    engine.stop()
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for mount in sorted((m for m in mounted if m.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "-l", mount], check=False)  # a killed engine leaves its layers mounted
    subprocess.run(["rm", "-rf", "--", str(folder)], check=False)  # many times as fast as shutil on 300,000 files


def _stub_key() -> str:
    digest = hashlib.sha256(PACKAGES.encode() + CERTIFICATES.read_bytes())
    for path in sorted(STUB.iterdir()):
        digest.update(path.read_bytes())
    digest.update(importlib.metadata.version("torch").encode())
    return digest.hexdigest()[:16]


def _make_base(engine: Engine, archive: Path) -> None:
    """Makes the stub base by debootstrap and docker/stub/Dockerfile, and saves it as `archive`."""
    with tempfile.TemporaryDirectory(prefix="sparktune-stub-", dir=archive.parent) as scratch:
        tree, context = Path(scratch) / "tree", Path(scratch) / "context"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(tree)],
            check=True, stdout=subprocess.DEVNULL,
        )
        with subprocess.Popen(
            ["tar", "-C", str(tree), "--exclude=./var/cache/apt", "--exclude=./var/lib/apt/lists", "-c", "."],
            stdout=subprocess.PIPE,
        ) as tar:
            engine.docker("import", "-", DEBIAN, stdin=tar.stdout)
        shutil.copytree(STUB, context)
        shutil.copy(CERTIFICATES, context)
        version = importlib.metadata.version("torch")
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(context / "wheels"),
             f"torch=={version}"], check=True,
        )
        engine.docker("build", "--network", "host", "-t", BASE, "-f", str(context / "Dockerfile"), str(context))
        partial = archive.with_suffix(".partial")
        engine.docker("save", "-o", str(partial), BASE)
        partial.rename(archive)


@pytest.fixture(scope="session")
def engine(engine_parts: Engine) -> Engine:
    """The engine, with the stub base in it."""
    archive = cache_dir("stubs") / f"base-{_stub_key()}.tar"
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.is_file():
        engine_parts.docker("load", "-i", str(archive))
    else:
        _make_base(engine_parts, archive)
    return engine_parts


@pytest.fixture
def client(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The SDK's client of the engine; records of builds go to a folder of this test's own."""
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return connect()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout whose stacks stand on the stub base."""
    target = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        text=True, check=True,
    ).stdout
    for name in listed.split("\0"):
        source = ROOT / name
        if not name or name.startswith(("tests/", "docs/", "lab/")) or not (source.is_symlink() or source.exists()):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target / name, follow_symlinks=False)
    for path in (target / "docker" / "stacks").glob("*/stack.yaml"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("nvcr.io/nvidia/pytorch:26.03-py3", BASE), encoding="utf-8")
    return target
