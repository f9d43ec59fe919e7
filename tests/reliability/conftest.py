"""A real memory control group for processes of a test."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

GROUPS = Path("/sys/fs/cgroup")
MIB = 2**20


class MemoryGroup:
    """A memory control group of its own, version 1 or 2, below no other.

    Args:
        limit_mib: what its processes may take together.
    """

    def __init__(self, limit_mib: int) -> None:
        version_1 = (GROUPS / "memory" / "memory.limit_in_bytes").is_file()
        root = GROUPS / "memory" if version_1 else GROUPS
        self.folder = root / f"sparktune-test-{os.getpid()}-{time.monotonic_ns()}"
        self._kills = "memory.oom_control" if version_1 else "memory.events"
        try:
            if not version_1:
                (root / "cgroup.subtree_control").write_text("+memory")
            self.folder.mkdir()
            limit = "memory.limit_in_bytes" if version_1 else "memory.max"
            (self.folder / limit).write_text(str(limit_mib * MIB))
        except OSError as error:
            raise RuntimeError(
                f"This test makes a memory control group, and {error.filename} cannot be written ({error.strerror}). "
                "It needs root, and a machine (or a privileged container) with /sys/fs/cgroup mounted writable and the "
                "memory controller of version 1 or 2."
            ) from error

    def start(self, argv: list[str], **more: Any) -> subprocess.Popen[str]:
        """Starts a process in the group; what it starts is in it too."""
        procs = self.folder / "cgroup.procs"
        return subprocess.Popen(argv, text=True, preexec_fn=lambda: procs.write_text(str(os.getpid())) and None, **more)

    def killed(self) -> int:
        """Returns how many processes the kernel has killed in it because memory ran out."""
        lines = (self.folder / self._kills).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def remove(self) -> None:
        """Removes the group; its last process may take a moment to leave."""
        deadline = time.monotonic() + 10
        while True:
            try:
                self.folder.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@pytest.fixture
def memory_group() -> Iterator[Callable[[int], MemoryGroup]]:
    """Makes memory groups, given a limit in MiB; they go with the test."""
    made: list[MemoryGroup] = []

    def make(limit_mib: int) -> MemoryGroup:
        made.append(MemoryGroup(limit_mib))
        return made[-1]

    yield make
    for group in made:
        group.remove()
