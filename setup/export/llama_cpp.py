"""llama.cpp at a pinned commit: its sources, from the pinned sdist and verified; its converter, kept in the cache.

The compiled programs are made from the same sources by llama_build.py.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import sparktune
from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.events import EventWriter
from sparktune.setup.plan.outfolder import check_free_space
from sparktune.setup.plan.rundir import cache_dir

__all__ = [
    "COMMIT", "PACKAGE", "SDIST_SHA256", "TREE_SHA256", "ChildResult", "child_environment", "converter_sources",
    "run_child", "unpack_whole",
]

PACKAGE = "llama-cpp-python==0.3.36"
"""The Python package whose source distribution carries llama.cpp whole; it is never built or installed here."""
SDIST = "llama_cpp_python-0.3.36.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
"""llama.cpp's commit in that sdist: the HEAD of the submodule it carries, compared when sources are unpacked whole."""
TREE_SHA256 = "fdbb659d768c135b48dc0a35b7bf30e6ad39225e915f3aa00d1be19f7ba9c61b"
"""Hash of the unpacked converter (names and bytes), checked at every use."""

_ROOT = PurePosixPath("llama_cpp_python-0.3.36/vendor/llama.cpp")
_HEAD = PurePosixPath("llama_cpp_python-0.3.36/.git/modules/vendor/llama.cpp/HEAD")
_WANTED = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
_SDIST_BYTES = 80 * 2**20
_UNPACKED_BYTES = 8 * 2**20
_TIMEOUT_S = 1800
_POLL_S = 0.25
_GRACE_S = 5
_LOG_BYTES = 2**20

# pip asks an sdist's build backend for its metadata even when it only downloads. This stand-in answers in its place, so
# that no build tool is fetched and no code of the sdist or of a build tool runs.
_STAND_IN = '''
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = Path(metadata_directory) / "llama_cpp_python-0.3.36.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 0.3.36\\n")
    (folder / "WHEEL").write_text("Wheel-Version: 1.0\\nGenerator: none\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return folder.name

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    raise SystemExit("this package is downloaded, never built")
'''


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _by_hand(cache: Path) -> str:
    return (
        f"Where there is a network, run `pip download --no-deps --no-binary llama-cpp-python {PACKAGE}`, then put "
        f"{SDIST} into {cache}."
    )


def _download(target: Path, cache: Path) -> Path:
    """Fetches the sdist with the user's own pip settings. pip checks the hash before it opens the file."""
    requirements = target / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    backend = target / "backend" / "scikit_build_core"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build.py").write_text(_STAND_IN, encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps",
        "--no-binary", "llama-cpp-python", "--no-build-isolation", "--require-hashes", "-r", str(requirements),
        "--dest", str(target),
    ]
    environment = {**os.environ, "PYTHONPATH": str(target / "backend")}
    environment.pop("PYTHONSAFEPATH", None)
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
            env=environment, cwd=target, timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        minutes = _TIMEOUT_S // 60
        raise PreflightError(f"pip did not fetch {PACKAGE} within {minutes} minutes. {_by_hand(cache)}") from error
    if done.returncode or not (target / SDIST).is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        shown = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else "no message")
        raise PreflightError(
            f"The GGUF converter's sources ({PACKAGE}, 77 MB, needed once) could not be fetched; pip says: {shown} "
            f"{_by_hand(cache)}"
        )
    return target / SDIST


def _verified(sdist: Path) -> Path:
    seen = _sha256(sdist)
    if seen != SDIST_SHA256:
        raise SparktuneError(
            f"{sdist} should have the sha256 {SDIST_SHA256}, it has {seen}. It is not the pinned file: remove it "
            "and start again."
        )
    return sdist


def _unpack(sdist: Path, folder: Path, wanted: tuple[str, ...] | None = _WANTED) -> str:
    """Takes regular files below `folder`, and nothing else, out of the sdist.

    Args:
        sdist: the archive.
        folder: where they go.
        wanted: first names of what is taken; the converter's by default, None for all.

    Returns:
        The commit that the archive states; empty when it states none.
    """
    commit = ""
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            inside = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) and path != _ROOT else None
            take = inside is not None and (wanted is None or inside.parts[0] in wanted)
            if not (take or path == _HEAD) or ".." in path.parts or not member.isfile():
                continue
            content = archive.extractfile(member)
            assert content is not None
            if inside is None:
                commit = content.read().decode("ascii", "replace").strip()
                continue
            target = folder.joinpath(*inside.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())
    return commit


def unpack_whole(scratch: Path, events: EventWriter) -> Path:
    """Returns a folder below `scratch` with llama.cpp's whole sources, from the pinned sdist.

    Raises:
        PreflightError: the sdist could not be fetched.
        SparktuneError: it is not the pinned file, or states another commit.
    """
    cache = cache_dir("llama.cpp")
    events.progress("fetching llama.cpp's sources", 0, None, "bytes")
    by_hand = cache / SDIST
    sdist = _verified(by_hand if by_hand.is_file() else _download(scratch, cache))
    folder = scratch / "llama.cpp"
    commit = _unpack(sdist, folder, None)
    if commit != COMMIT:
        raise SparktuneError(f"{SDIST} should carry llama.cpp at {COMMIT}, it states {commit or 'no commit'}.")
    return folder


def _tree_sha256(folder: Path) -> str:
    """Returns one hash over names and bytes of all files, bytecode aside."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc"):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{_sha256(file)}\n".encode())
    return digest.hexdigest()


def _checked_tree(folder: Path) -> Path:
    seen = _tree_sha256(folder)
    if seen != TREE_SHA256:
        raise SparktuneError(
            f"{folder} should hold llama.cpp's converter at {COMMIT[:9]} unchanged (tree hash {TREE_SHA256}); its hash "
            f"is {seen}. Remove that folder and start again: it will be fetched anew."
        )
    return folder


def converter_sources(events: EventWriter) -> Path:
    """Returns the folder of the pinned converter, fetching it at the first use.

    The folder is `sparktune/llama.cpp/COMMIT` in the user's cache, and appears by rename. An sdist put beside it by
    hand is used instead of a download; either is used only if its sha256 is the pinned one.

    Raises:
        PreflightError: it could not be fetched, or the cache cannot be written.
        SparktuneError: the file has another hash.
    """
    cache = cache_dir("llama.cpp")
    folder = cache / COMMIT
    if folder.is_dir():
        return _checked_tree(folder)
    events.progress("fetching llama.cpp's converter", 0, None, "bytes")
    check_free_space(folder, _SDIST_BYTES + _UNPACKED_BYTES, "The GGUF converter")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            by_hand = cache / SDIST
            sdist = _verified(by_hand if by_hand.is_file() else _download(Path(scratch), cache))
            private = Path(scratch) / COMMIT
            _unpack(sdist, private)
            _checked_tree(private)
            try:
                os.rename(private, folder)
            except OSError:
                # another process was faster; its folder is as good as ours
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise PreflightError(f"{cache} cannot be written: {error.strerror or error}. Set XDG_CACHE_HOME.") from error
    events.message(f"The GGUF converter (llama.cpp {COMMIT[:9]}, sha256 verified) is in {folder}.")
    return folder


def child_environment(sources: Path, scratch: Path) -> dict[str, str]:
    """Returns the environment of a process that runs the converter or its gguf package.

    llama.cpp's modules come from `sources`, ours from where they are now; it may not ask any network, and it writes no
    bytecode into the cache. The converter imports its neighbours, so the path is given and PYTHONSAFEPATH is not. Of
    this process's PYTHONPATH goes along what it really imports from itself (a stage of a run has none of it).
    """
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "NO_LOCAL_GGUF", "PYTHONHOME")}
    ours = Path(sparktune.__file__).parents[1]
    given = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p in sys.path and Path(p).is_absolute()]
    return keep | {
        "PYTHONPATH": os.pathsep.join([str(sources), str(sources / "gguf-py"), str(ours), *given]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TMPDIR": str(scratch),
    }



@dataclass(frozen=True, kw_only=True)
class ChildResult:
    """How a child process ended."""

    code: int
    output: str
    """Standard output and error together; the last MiB."""


def run_child(
    command: list[str], environment: dict[str, str], scratch: Path, on_poll: Callable[[], None]
) -> ChildResult:
    """Runs one process of the converter in `scratch` and waits for it; it never outlives this call.

    Args:
        command: argument list.
        environment: see child_environment.
        scratch: working folder, private, so that nothing in it can shadow a module.
        on_poll: called several times a second.
    """
    log = scratch / "child.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    on_poll()
        finally:
            if process.poll() is None:
                # ninja ends its compilers when it is asked to, and cannot when it is killed
                process.terminate()
                try:
                    process.wait(timeout=_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    raw = log.read_bytes()[-_LOG_BYTES:]
    # progress bars redraw their line: only what each line ended with is worth keeping
    lines = raw.decode("utf-8", "replace").split("\n")
    return ChildResult(code=code, output="\n".join(line.rpartition("\r")[2] for line in lines))
