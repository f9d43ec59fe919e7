"""One run a GPU: a lock that dies with its process, in the user's cache folder, which containers share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.rundir import cache_dir

__all__ = ["gpu_identity", "hold_gpu"]

_LONGEST_NOTE = 300


def gpu_identity(device: torch.device) -> tuple[str, str] | None:
    """Returns (what no other GPU has, its name), None for a device that several runs may share."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return str(found.uuid), found.name


@contextmanager
def hold_gpu(device: torch.device, run: str, identity: tuple[str, str] | None = None) -> Iterator[None]:
    """Holds a GPU for this process: two runs on one would share its memory, and neither plan would fit.

    Args:
        device: where the run computes; a CPU is not held.
        run: the run's name, for whoever comes second.
        identity: of the GPU; read from the device when left out.

    Raises:
        PreflightError: another process holds it; the sentence names its run.
    """
    identity = identity or gpu_identity(device)
    if identity is None:
        yield
        return
    key, name = identity
    path = cache_dir("locks") / f"gpu-{key}.lock"
    handle = _open(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            who = os.pread(handle, _LONGEST_NOTE, 0).decode("utf-8", "replace").strip()
            raise PreflightError(
                f"The GPU {name} is taken: {who or 'another process'} computes on it. Wait for its end, stop it "
                "(Ctrl-C there), or choose another GPU with CUDA_VISIBLE_DEVICES."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"the run {run} (process {os.getpid()})".encode()[:_LONGEST_NOTE], 0)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise PreflightError(
            f"{path} should be writable, it is the lock of the GPU: {error.strerror}. XDG_CACHE_HOME says where caches "
            "are."
        ) from error
