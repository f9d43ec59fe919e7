"""A real Docker engine for the tests, started here, and a base image that poses as NVIDIA's, made here.

The engine is Debian's docker.io with its own socket and a file system of its own; no registry and no bridge is needed.
The base is kept in the cache (`stubs`), named by its content, so only the first run on a machine makes it. It also
carries the name of NVIDIA's image, so that this very checkout builds on it, unchanged.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.machine import image_checks
from sparktune.setup.machine.engine import connect
from sparktune.setup.machine.image import load_stack
from sparktune.setup.plan.rundir import cache_dir

ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "docker" / "stub"
BASE = "sparktune-stub-base:test"
NVIDIA = load_stack(ROOT, "2026.05").base_image
"""The name that the checkout's own stacks build on."""
DEBIAN = "sparktune-stub-debian:test"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = "python3,python3-pip,python3-venv,python3-dev,gcc,libc6-dev,ca-certificates"
TOOLS = {"/usr/sbin/dockerd": "docker.io", "/usr/bin/docker": "docker.io (from Debian 13 on: docker-cli)",
         "/usr/bin/containerd": "containerd", "/usr/sbin/debootstrap": "debootstrap",
         "/usr/bin/docker-registry": "docker-registry", "/usr/bin/setpriv": "util-linux", "/usr/bin/ps": "procps",
         "/usr/sbin/mkfs.ext4": "e2fsprogs"}
APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
"""Where this says Y, an engine starts no container without `apparmor_parser`."""
SIX = "six==1.17.0 --hash=sha256:4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274\n"
"""The lock file of a build that takes seconds."""
TOKEN = "hf_MarkerThatMustNeverShow0123456789"
"""Set as the user's hub token while every image here is built and every stage is run."""
DISK_BYTES = 64 * 2**30
NEEDED_BYTES = 16 * 2**30
"""Of DISK_BYTES, what the whole tier comes to fill."""
_PREFIX = "sparktune-engine-"


class Engine:
    """A dockerd of the tests' own, on a file system of its own: a sparse file, which a test may fill."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.socket = folder / "docker.sock"
        self.host = f"unix://{self.socket}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.data.mkdir()
        disk = folder / "disk.ext4"
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        # it lives as long as the tests: nothing has to survive a power cut
        subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(disk)], check=True)
        self.mount("-o", "loop,noatime", str(disk), str(self.data))
        filesystems = Path("/proc/filesystems").read_text(encoding="utf-8").split()
        if "overlay" not in filesystems and subprocess.run(["modprobe", "overlay"], check=False).returncode:
            # the engine's other driver, vfs, copies a layer whole: forty times the base's two gigabytes an image
            raise RuntimeError("The kernel has no overlay file system, on which the engine's images stand: "
                               "`modprobe overlay` failed. Run these tests on a kernel that has it.")
        if not any(line.split()[2].startswith("cgroup") for line in _mounts()):
            self.mount("-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")

    @staticmethod
    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"The engine's tests must mount file systems, and `mount {' '.join(arguments)}` failed: "
                               f"{done.stderr.strip()}. Run them as root on a machine, or in a privileged container.")

    def start(self) -> None:
        """Starts it and waits until it answers. No bridge and no firewall: it needs no network of its own."""
        state = self.folder / "exec"
        address = state / "containerd.sock"
        # a containerd of its own: an engine would take the machine's, where it finds one
        self._spawn("/usr/bin/containerd", "--address", str(address), "--root", str(self.data / "containerd"),
                    "--state", str(state / "containerd"))
        self._until("containerd", address.exists)
        self._spawn("/usr/sbin/dockerd", "--iptables=false", "--bridge=none", "--ip-forward=false",
                    "--storage-driver=overlay2", "--containerd", str(address), "-H", self.host,
                    "--data-root", str(self.data), "--exec-root", str(state), "-p", str(self.folder / "pid"))
        self._until("dockerd", lambda: self.docker("version", check=False).returncode == 0)
        self.socket.chmod(0o666)  # some tests act as another user

    def _spawn(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{Path(program).name}.log").open("ab") as log:
            self._processes.append(subprocess.Popen(
                [program, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            ))

    def _until(self, name: str, answers: Callable[[], bool]) -> None:
        """Waits until the program just started answers."""
        deadline = time.monotonic() + 60
        while not answers():
            code = self._processes[-1].poll()
            if code is None and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
            worst = [line for line in lines if re.search(r"level=(error|fatal)|^failed|cannot|denied", line)]
            what = "does not answer after 60 s" if code is None else f"ended with {code} before it answered"
            said = "\n".join((worst or lines)[-8:])
            raise RuntimeError(f"The tests' Docker engine could not be started here: {name} {what}. It said:\n{said}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends it; what does not end with it (the shims of its containers, after a SIGKILL) is ended by its id."""
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(number)
                try:
                    process.wait(timeout=40)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._processes.clear()
        deadline = time.monotonic() + 5
        while (left := _programs(self.folder)) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        # a new containerd waits for the old one's database lock and gives up after 15 s
        shutil.rmtree(self.folder / "exec", ignore_errors=True)
        (self.folder / "pid").unlink(missing_ok=True)

    def remove(self) -> None:
        """Ends what still runs in it, and it, and takes its file system away."""
        if left := self.docker("ps", "-q", check=False).stdout.split():
            self.docker("rm", "-f", *left, check=False)
        self.stop()
        _unmount(self.folder)
        shutil.rmtree(self.folder)

    @contextmanager
    def almost_full(self, free_bytes: int) -> Iterator[None]:
        """Leaves `free_bytes` on the engine's file system for a while."""
        filler = self.data / "filler"
        try:
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self.data).free - free_bytes)
            yield
        finally:
            filler.unlink(missing_ok=True)

    def tags(self) -> set[str]:
        """Returns every tag of ours."""
        listed = self.docker("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.split()
        return {tag for tag in listed if tag.startswith("sparktune:")}

    def idle(self) -> bool:
        """Returns whether there is no container at all, running or not."""
        return not self.docker("ps", "-aq").stdout.split()

    def docker(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs the command line against this engine."""
        env = {**os.environ, "DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "1"}
        return subprocess.run(
            ["/usr/bin/docker", *arguments], env=env, capture_output=True, text=True, check=check, **options
        )


def _mounts() -> list[str]:
    """Returns the lines of /proc/mounts."""
    return Path("/proc/mounts").read_text(encoding="utf-8").splitlines()


def _unmount(folder: Path) -> None:
    """Takes away every file system that is mounted below `folder`: a killed engine leaves its layers mounted."""
    below = [path for path in (line.split()[1] for line in _mounts()) if path.startswith(f"{folder}/")]
    for path in sorted(below, reverse=True):
        subprocess.run(["umount", "-l", path], check=False)


def _programs(folder: Path) -> list[int]:
    """Returns the process ids of the engine in `folder`: dockerd, containerd, its shims and what they run."""
    # -ww: a variable COLUMNS would cut the lines, pipe or not
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    split = [line.split(None, 2) for line in listed.splitlines()]
    engine = {pid for pid, _, said in split
              if f"{folder}/exec" in said and re.match(r"\S*/(dockerd|containerd)", said)}
    # the first process of a container outlives its shim; what it started goes with it
    return [int(pid) for pid, parent, said in split if pid in engine or parent in engine]


def _clear_abandoned() -> None:
    """Takes away engines whose tests were killed: their programs, mounts and gigabytes outlive the test process."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if not owner.isdecimal() or Path("/proc", owner).exists():
            continue
        for pid in _programs(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _unmount(folder)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def engine_parts() -> Iterator[Engine]:
    """The engine, without any image."""
    assert os.geteuid() == 0, "the tests of the image start a Docker engine, which needs root"
    missing = [package for tool, package in TOOLS.items() if not Path(tool).exists()]
    if APPARMOR.is_file() and APPARMOR.read_text().strip() == "Y" and not Path("/usr/sbin/apparmor_parser").exists():
        missing.append("apparmor")
    assert not missing, f"the tests of the image need Debian's tools: apt-get install {' '.join(missing)}"
    _clear_abandoned()
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    assert free > NEEDED_BYTES, (
        f"the tests of the image need {NEEDED_BYTES / 2**30:.0f} GiB in {place}; {free / 2**30:.1f} GiB is free. "
        "Free some, or let TMPDIR name another folder")
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    folder.chmod(0o755)
    try:
        engine = Engine(folder)
    except BaseException:
        _unmount(folder)
        shutil.rmtree(folder)
        raise
    try:
        engine.start()
        yield engine
    finally:
        engine.remove()


def _stub_key() -> str:
    digest = hashlib.sha256(PACKAGES.encode() + CERTIFICATES.read_bytes())
    for path in sorted(STUB.iterdir()):
        digest.update(path.read_bytes())
    digest.update(importlib.metadata.version("torch").encode())
    return digest.hexdigest()[:16]


def _torch_wheel(folder: Path) -> None:
    """Fetches the CPU build of torch that these tests run on, where pip is configured or PyTorch's index holds it."""
    wanted = f"torch=={importlib.metadata.version('torch')}"
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    if subprocess.run([*pip, "--python-version", "3.11", wanted], check=False).returncode:
        # uv knows where that is, and says so beside the package
        said = subprocess.run(
            [sys.executable, "-m", "uv", "pip", "compile", "--torch-backend", "cpu", "--emit-index-annotation",
             "--no-deps", "-"], input=wanted.partition("+")[0], capture_output=True, text=True, check=True,
        ).stdout
        index = re.findall(r"# from (\S+)", said)[0]
        subprocess.run([*pip, "--index-url", index, wanted], check=True)


def _make_base(engine: Engine, archive: Path) -> None:
    """Makes the stub base by debootstrap and docker/stub/Dockerfile, and saves it as `archive`."""
    with tempfile.TemporaryDirectory(prefix="sparktune-stub-", dir=archive.parent) as scratch:
        tree, context = Path(scratch) / "tree", Path(scratch) / "context"
        tree.mkdir()
        # dpkg waits for the disk after every file: in memory that costs nothing
        Engine.mount("-t", "tmpfs", "-o", "size=2g", "tmpfs", str(tree))
        try:
            subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(tree)],
                check=True, stdout=subprocess.DEVNULL,
            )
            with subprocess.Popen(
                ["tar", "-C", str(tree), "--exclude=./var/cache/apt", "--exclude=./var/lib/apt/lists", "-c", "."],
                stdout=subprocess.PIPE,
            ) as tar:
                engine.docker("import", "-", DEBIAN, stdin=tar.stdout)
        finally:
            _unmount(Path(scratch))
        shutil.copytree(STUB, context)
        shutil.copy(CERTIFICATES, context)
        _torch_wheel(context / "wheels")
        engine.docker("build", "--network", "host", "-t", BASE, "-f", str(context / "Dockerfile"), str(context))
        partial = archive.with_suffix(".partial")
        engine.docker("save", "-o", str(partial), BASE)
        partial.rename(archive)
        for old in {*archive.parent.glob("base-*.tar")} - {archive}:
            old.unlink()  # of another content; gigabytes each


@pytest.fixture(scope="session")
def engine(engine_parts: Engine) -> Engine:
    """The engine, with the stub base in it, under its own name and under NVIDIA's."""
    archive = cache_dir("stubs") / f"base-{_stub_key()}.tar"
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.is_file():
        engine_parts.docker("load", "-i", str(archive))
    else:
        _make_base(engine_parts, archive)
    engine_parts.docker("tag", BASE, NVIDIA)
    return engine_parts


@pytest.fixture
def client(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The SDK's client of the engine; records of builds go to a folder of this test's own."""
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(image_checks, "MEMORY_GIB", 1.0)  # nothing compiles CUDA here
    return connect()


class Checkout:
    """A copy of the checkout that a test may change."""

    def __init__(self, root: Path) -> None:
        self.root = root
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
            text=True, check=True,
        ).stdout
        for name in listed.split("\0"):
            source = ROOT / name
            if not name or name.startswith(("tests/", "docs/", "lab/")) or not (source.is_symlink() or source.exists()):
                continue
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, root / name, follow_symlinks=False)

    def stack(self, name: str, file: str) -> Path:
        """Returns a file of a stack."""
        return self.root / "docker" / "stacks" / name / file

    def set_lock(self, text: str, stack: str = "2026.05") -> None:
        """Makes `text` what pip installs from wheels."""
        self.stack(stack, "requirements.lock").write_text(text, encoding="utf-8")

    def shrink(self, stack: str = "2026.05", smoke: str = "") -> None:
        """Leaves one package in a stack and `smoke` of the smoke test: a build of the baseline then takes seconds."""
        self.set_lock(SIX, stack)
        (self.root / "docker" / "smoke_test.py").write_text(smoke, encoding="utf-8")

    def before_pip(self, command: str) -> None:
        """Puts `command` in front of the first installation of a shrunk baseline."""
        self.shrink()
        dockerfile = self.root / "docker" / "Dockerfile"
        text = dockerfile.read_text(encoding="utf-8")
        install = "    python -m pip install"
        assert install in text
        dockerfile.write_text(text.replace(install, f"    {command} && \\\n{install}", 1), encoding="utf-8")

    def stand_still(self) -> None:
        """Makes the build stand still there; it says `standing still`."""
        self.before_pip("echo standing still && sleep 301")

    @staticmethod
    def standing() -> list[str]:
        """Returns the processes of a build that stands still, as `ps` lists them."""
        found = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        return [line for line in found.splitlines() if "sleep 301" in line and "pytest" not in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A copy of the checkout, for tests that change it."""
    return Checkout(tmp_path / "checkout")
