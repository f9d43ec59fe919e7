"""Folders that appear whole or not at all: built as NAME.partial, synced, renamed. Large copies, free space."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sparktune.setup.plan.errors import PreflightError, SparktuneError, UsageError

__all__ = [
    "build_folder", "check_free_space", "copy_file", "gib", "link_or_copy", "put_in_place", "remove_unfinished",
    "size_of", "write_durably",
]

_MARK = ".sparktune-partial"
_UNFINISHED = re.compile(r"\..+\.\d+\.partial")
_COPY_STEP = 64 * 2**20
# The kernel refuses copy_file_range between some file systems, or knows it not at all; reading and writing still works.
_NO_RANGE_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)


def gib(n_bytes: int) -> str:
    """Returns a size for people: GiB with two digits, or MiB below a tenth of a GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 / 10 else f"{n_bytes / 2**20:.1f} MiB"


def size_of(path: Path) -> int:
    """Returns the bytes of a file or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def check_free_space(folder: Path, needs_bytes: int, what: str) -> None:
    """Raises PreflightError when the file system of `folder` (or of its nearest parent) has not `needs_bytes` free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needs_bytes:
        raise PreflightError(
            f"{what} needs {gib(needs_bytes)} in {folder.parent}, but {gib(free)} is free there. "
            "Free some space, or point --output at another disk."
        )


def _explain(error: OSError, folder: Path) -> SparktuneError:
    """Turns an operating system's refusal into a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SparktuneError(
            f"The disk of {folder.parent} is full ({error.strerror}); {folder} was not made. Free some space, or point "
            "--output at another disk, and start again."
        )
    refused = Path(error.filename) if isinstance(error.filename, str) else folder
    if not refused.is_relative_to(folder.parent) and not folder.is_relative_to(refused):
        return PreflightError(f"{refused} cannot be read: {error.strerror or error}. {folder} was not made.")
    return PreflightError(
        f"{folder} cannot be written: {error.strerror or error} ({refused}). Give a folder you may write to."
    )


def _start(folder: Path, replace: Callable[[Path], bool] | None) -> Path:
    if (folder.exists() or folder.is_symlink()) and not (replace and replace(folder)):
        raise UsageError(
            f"{folder} exists already and is left as it is. Remove it, or choose another name (--name) or folder "
            "(--output)."
        )
    shutil.rmtree(_aside(folder, "ready"), ignore_errors=True)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        # a kill between the two lines below leaves an empty folder, which nobody misses
        if not (partial / _MARK).is_file() and any(partial.iterdir()):
            raise UsageError(f"{partial} is in the way and was not made by this program. Move it elsewhere.")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / _MARK).touch()
    return partial


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(ready: Path, folder: Path, old: Path) -> None:
    """Gives a whole folder its final name. rename cannot replace a filled one: what stands there steps aside to `old`,
    comes back if the new one cannot have the name, and goes once the new one stands.

    Args:
        ready: the folder, complete and synced.
        folder: its final name.
        old: a name beside it that is ours.

    Raises:
        OSError: the file system refused.
    """
    stood = folder.exists()
    if stood:
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    try:
        os.rename(ready, folder)
    except OSError:
        if stood:
            os.rename(old, folder)
        raise
    _sync(folder.parent)
    if stood:
        shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path, why: str) -> Path:
    """The name of a folder on its way: `ready` is whole and has lost its mark, `old` is what it replaces.

    Both are ours by their names alone.
    """
    return folder.with_name(f".{folder.name}.sparktune-{why}")


def _publish(partial: Path, folder: Path) -> None:
    ready, old = _aside(folder, "ready"), _aside(folder, "old")
    # without its mark, FOLDER.partial would be a stranger's to the run that follows a kill
    os.rename(partial, ready)
    try:
        (ready / _MARK).unlink()
        for file in sorted(ready.rglob("*")):
            _sync(file)
        _sync(ready)
        put_in_place(ready, folder, old)
    except BaseException:
        shutil.rmtree(ready, ignore_errors=True)
        raise


@contextlib.contextmanager
def build_folder(
    folder: Path, *, needs_bytes: int, what: str, replace: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yields `FOLDER.partial` to fill; it becomes `folder` by rename, after fsync, when the block ends without error.

    After an error or an interruption nothing is left; after a kill, `FOLDER.partial` is, and the next call removes it.

    Args:
        folder: the final name.
        needs_bytes: predicted size, checked against the free space before anything is written.
        what: the work's name for messages, for instance "The merged model".
        replace: says whether an existing `folder` is ours to replace; without it, it never is.

    Raises:
        UsageError: `folder` exists and is not ours to replace.
        PreflightError: too little space, or the folder cannot be written.
        SparktuneError: the disk filled up meanwhile.
    """
    check_free_space(folder, needs_bytes, what)
    try:
        partial = _start(folder, replace)
    except OSError as error:
        raise _explain(error, folder) from error
    try:
        yield partial
        _publish(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _explain(error, folder) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_file(source: Path, target: Path, progress: Callable[[int], None] | None = None) -> None:
    """Copies a file's bytes (links followed), sharing blocks where the file system can.

    Args:
        source: file to read; a link is followed, so that a hub cache's links become real files.
        target: file to make; must not exist.
        progress: called with the number of bytes of each step.
    """
    with source.open("rb") as src, target.open("xb") as dst:
        left = os.fstat(src.fileno()).st_size
        by_range = hasattr(os, "copy_file_range")
        while left:
            if by_range:
                try:
                    done = os.copy_file_range(src.fileno(), dst.fileno(), min(left, _COPY_STEP))
                except OSError as error:
                    if error.errno not in _NO_RANGE_COPY:
                        raise
                    by_range, done = False, 0
                if not done:  # some file systems answer 0 although bytes are left
                    by_range = False
                    continue
            else:
                piece = os.read(src.fileno(), min(left, _COPY_STEP))
                if not piece:
                    raise SparktuneError(f"{source} became shorter while it was copied. Start again.")
                view = memoryview(piece)
                while view:
                    view = view[os.write(dst.fileno(), view):]
                done = len(piece)
            left -= done
            if progress:
                progress(done)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-links `target` to `source`, or copies where the file system cannot link. Returns whether it is a link."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        copy_file(source, target)
        return False
    return True


def write_durably(
    path: Path, text: str, *, lossy: bool = False, explain: Callable[[Path, OSError], SparktuneError] | None = None
) -> None:
    """Writes a small text file, UTF-8, so that `path` holds the old or the new text, never a part of it.

    Its folder is made where it is not there.

    Args:
        path: the file.
        text: its new content.
        lossy: what UTF-8 cannot hold (half a surrogate pair, which a model's answer may contain) becomes a question
            mark instead of an error.
        explain: makes the error to raise of (path, the system's refusal); without it the refusal itself is raised.

    Raises:
        OSError: the file cannot be written; or what `explain` makes of that.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="replace" if lossy else "strict", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if explain is None:
            raise
        raise explain(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_unfinished(*folders: Path) -> None:
    """Removes what a killed `write_durably` left below folders, and a killed `build_folder` beside them.

    For whoever holds the lock under which these folders are written: another process's file would go too.
    """
    for folder in folders:
        shutil.rmtree(_aside(folder, "ready"), ignore_errors=True)
        old = _aside(folder, "old")
        if folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        elif old.is_dir():
            os.rename(old, folder)  # killed between two renames: what was there before is whole
        for path in folder.rglob(".*.partial") if folder.is_dir() else ():
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)
