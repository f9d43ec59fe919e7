"""The host memory a process may take: what the kernel calls available, within the limits of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_bytes", "floor_gib", "reserve_gib", "total_bytes"]

_RESERVE_SHARE = 0.05
_RESERVE_LEAST_GIB = 4.0
"""Left to the system on unified memory: a GB10 that runs out takes the whole machine with it, not one process."""
_FLOOR_SHARE, _FLOOR_LEAST_GIB = 0.01, 0.2
"""Where the model is not on a GPU that shares the host's memory: enough for a checkpoint's buffers and a shell."""
_GIB = 2**30
_NO_LIMIT = 2**60
"""Version 1 writes 2**63 less a page where nobody set a limit."""


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns MemAvailable, or less where a control group's limit leaves less. Reads a few small files.

    A group counts page cache as used although it gives it back when memory is wanted, as MemAvailable knows; so does
    this sum. Every group above the process's own counts too. Versions 1 and 2.

    Args:
        proc: the proc file system.
        groups: the control groups' file system.
    """
    found = _mem_available(proc / "meminfo")
    for folder, limit_name, used_name, cache_key in _own_groups(proc / "self" / "cgroup", groups):
        left = _left(folder, limit_name, used_name, cache_key)
        found = found if left is None else min(found, left)
    return found


def total_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the memory of the machine, or the least limit of the process's control groups where that is less.

    Args:
        proc: the proc file system.
        groups: the control groups' file system.
    """
    limits = (_limit(folder / name) for folder, name, _, _ in _own_groups(proc / "self" / "cgroup", groups))
    return min([_physical(), *(limit for limit in limits if limit is not None)])


def reserve_gib(total_gib: float) -> float:
    """Returns what a training process leaves to the system where GPU and CPU share the memory, in GiB.

    Args:
        total_gib: memory of the machine.
    """
    return max(_RESERVE_LEAST_GIB, _RESERVE_SHARE * total_gib)


def floor_gib() -> float:
    """Returns the free memory of the host below which a training stops where it shares none with a GPU, in GiB.

    A hundredth of what machine and control groups allow. A plan has to leave it free, or it would be stopped.
    """
    return max(_FLOOR_LEAST_GIB, _FLOOR_SHARE * total_bytes() / _GIB)


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mem_available(path: Path) -> int:
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _physical()


def _own_groups(listing: Path, groups: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yields (folder, limit's file, use's file, key of the page cache) of this process's groups, from within.

    In a container the listing may name a path of the host that is not there; the file system's root is the group then.
    """
    try:
        lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root = groups
            names = ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        folder = root / path.strip("/")
        while folder != root:
            yield folder, *names
            folder = folder.parent
        yield root, *names


def _limit(path: Path) -> int | None:
    """Returns a group's limit in bytes, None where it has none."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _left(folder: Path, limit_name: str, used_name: str, cache_key: str) -> int | None:
    """Returns what a group's limit leaves, None where it has none."""
    limit = _limit(folder / limit_name)
    if limit is None:
        return None
    try:
        used = int((folder / used_name).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    cache = {key: int(value) for key, _, value in (line.partition(" ") for line in stat.splitlines())
             if value.strip().isdigit()}
    shared = cache.get("total_shmem" if cache_key.startswith("total") else "shmem", 0)  # a tmpfs gives nothing back
    return max(0, limit - used + max(0, cache.get(cache_key, 0) - shared))
