"""What counts as free memory, the watchdog that stops a run while there is some, and the lock that keeps a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sparktune.setup.export import hf_reference
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.hostmemory import available_bytes, total_bytes
from sparktune.training import memory
from sparktune.training.gpu_lock import hold_gpu
from sparktune.training.memory import cap_allocator, host_floor_gib, is_out_of_memory
from sparktune.training.stop import StopRequest
from sparktune.training.watchdog import PERIOD_S, MemoryWatchdog

GIB = 2**30
CPU = torch.device("cpu")


def machine(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """Lays out a proc file system and control groups."""
    for name, text in {"proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 20971520 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "groups"


def test_without_a_limit_the_kernels_word_counts(tmp_path: Path) -> None:
    assert available_bytes(*machine(tmp_path, {})) == 20 * GIB
    unlimited = {"proc/self/cgroup": "0::/a\n4:memory:/b\n", "groups/a/memory.max": "max\n",
                 "groups/memory/b/memory.limit_in_bytes": "9223372036854771712\n"}
    assert available_bytes(*machine(tmp_path, unlimited)) == 20 * GIB
    assert total_bytes(*machine(tmp_path, unlimited)) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("where", ["own", "above", "container"])
def test_a_groups_limit_counts_and_its_page_cache_is_free(tmp_path: Path, version: int, where: str) -> None:
    line, base = ("0::/slice/job\n", "groups") if version == 2 else ("4:cpu,memory:/slice/job\n", "groups/memory")
    folder = {"own": f"{base}/slice/job", "above": f"{base}/slice", "container": base}[where]
    limit, used = (("memory.max", "memory.current") if version == 2
                   else ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    cache, shared = ("file", "shmem") if version == 2 else ("total_cache", "total_shmem")
    files = {
        "proc/self/cgroup": line, f"{folder}/{limit}": f"{8 * GIB}\n", f"{folder}/{used}": f"{7 * GIB}\n",
        f"{folder}/memory.stat": f"anon {4 * GIB}\n{cache} {3 * GIB}\n{shared} {GIB}\n",
    }
    assert available_bytes(*machine(tmp_path, files)) == 3 * GIB  # 8 - 7 + 3 of cache - 1 of it a tmpfs's
    (tmp_path / folder / limit).write_text("1048576\n")
    assert total_bytes(*machine(tmp_path, {})) == 2**20  # the floor of a container is a hundredth of its own limit


def test_a_model_beside_a_gguf_is_as_precise_as_its_group_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_reference, "available_bytes", lambda: 700 * 2**20)
    assert hf_reference._free_bytes("cpu") == 700 * 2**20


def test_a_real_group_is_read(tmp_path: Path) -> None:
    """A child in a memory group of 700 MiB, where this machine lets us make one; else what it reads is laid out."""
    root = Path("/sys/fs/cgroup/memory")
    code = "from sparktune.setup.plan.hostmemory import available_bytes; print(available_bytes())"
    group = root / f"sparktune-test-{os.getpid()}"
    if not (root / "memory.limit_in_bytes").is_file() or not os.access(root, os.W_OK):
        proc, groups = machine(tmp_path, {"proc/self/cgroup": "0::/\n", "groups/memory.max": str(700 * 2**20),
                                          "groups/memory.current": "0", "groups/memory.stat": "file 0\n"})
        assert available_bytes(proc, groups) == 700 * 2**20
        return
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(700 * 2**20))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
        assert 500 * 2**20 < int(done.stdout) <= 700 * 2**20
    finally:
        group.rmdir()


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_the_watchdog_looks_four_times_a_second_and_stops_a_run_below_the_floor(stop: StopRequest) -> None:
    assert PERIOD_S <= 0.25
    stop.looping = True
    free = [8.0]
    with MemoryWatchdog(stop, 2.0, lambda: free[0]) as dog:
        until(lambda: dog.looks >= 2)
        assert not stop.requested
        free[0] = 1.99
        until(lambda: stop.requested)
    assert (stop.urgent, stop.aborted) == (True, False)
    assert "only 1.99 GiB of memory is free and the system needs 2.00" in stop.why


def test_a_stop_that_was_asked_for_becomes_urgent(stop: StopRequest) -> None:
    stop.looping = stop.requested = True
    with MemoryWatchdog(stop, 2.0, lambda: 1.0):
        until(lambda: stop.urgent)
    assert (stop.why, stop.aborted) == ("as you asked", False)  # no second signal, which would abort


def test_before_the_first_step_the_watchdog_ends_the_process(stop: StopRequest) -> None:
    with pytest.raises(KeyboardInterrupt), MemoryWatchdog(stop, 2.0, lambda: 1.0):
        time.sleep(30)
    assert not stop.aborted


def test_the_floors_and_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.2 <= host_floor_gib(CPU) < 100
    assert cap_allocator(CPU) is None
    gb10 = torch.device("cuda", 0)
    asked: list[float] = []
    monkeypatch.setattr(memory, "is_unified", lambda device: device == gb10)
    monkeypatch.setattr(memory, "available_bytes", lambda: 110 * GIB)
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 120 * GIB // 4096))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GIB, 120 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share))
    assert host_floor_gib(gb10) == pytest.approx(4.8)  # four fifths of the reserve, which the planner leaves whole
    assert cap_allocator(gb10) == pytest.approx(104.0)  # of 110 free, 6 are the system's
    assert asked == [pytest.approx(104 / 120)]


def test_what_is_an_allocation_that_failed() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.float64)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


_HOLDER = (
    "import sys, torch\n"
    "from sparktune.training.gpu_lock import hold_gpu\n"
    "with hold_gpu(torch.device('cuda', 0), 'first', ('GPU-1', 'A GPU')):\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.read()\n"
)


def test_one_run_a_gpu_and_the_second_is_told_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = torch.device("cuda", 0)
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PreflightError, match=rf"The GPU A GPU is taken: the run first \(process {holder.pid}\)"), \
                hold_gpu(gpu, "second", ("GPU-1", "A GPU")):
            raise AssertionError("two runs on one GPU")
        with hold_gpu(gpu, "second", ("GPU-2", "A GPU")):
            pass
        with hold_gpu(CPU, "second"):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with hold_gpu(gpu, "second", ("GPU-1", "A GPU")):  # the lock died with the process that was killed
        pass
