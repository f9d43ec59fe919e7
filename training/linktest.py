"""What the link between machines carries: large sums between one process of each, as training sends them.

    python -m sparktune.training.linktest --node 0/2@192.168.100.1:29500

The same command on every machine, each with its own number; machine 0 prints one line of JSON. NCCL where every machine
has a GPU, gloo where one has none: gloo goes through the kernel and one thread, so it shows less than the link gives.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.links import MEASURED
from sparktune.training.launch import Node, name_interfaces

__all__ = ["main", "measure"]

_MEET_S = 120.0
_BYTES = {"nccl": 512 * 2**20, "gloo": 32 * 2**20}
_LEAST_S = 2.0
"""Measured for so long at least."""
_MOST = 200


def measure(payload: torch.Tensor, ranks: int) -> tuple[float, int]:
    """Returns (bytes a second that every rank sent, sums made).

    A ring sends 2 (n - 1) / n of the payload from every rank.

    Args:
        payload: float32 [N], on the device that trains.
        ranks: processes.
    """
    def synchronised() -> float:
        if payload.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(2):  # connections, and NCCL's choice of a way
        dist.all_reduce(payload)
    # every rank makes as many: what one sum takes, as the slowest of them sees it
    dist.barrier()
    begun = synchronised()
    dist.all_reduce(payload)
    took = torch.tensor([synchronised() - begun], dtype=torch.float64, device=payload.device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    times = max(3, min(_MOST, round(_LEAST_S / float(took))))
    dist.barrier()
    begun = synchronised()
    for _ in range(times):
        dist.all_reduce(payload)
    seconds = synchronised() - begun
    return 2 * (ranks - 1) / ranks * payload.numel() * payload.element_size() * times / seconds, times


def main() -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(prog="linktest", description=__doc__, allow_abbrev=False)
    parser.add_argument("--node", required=True, metavar="I/N@HOST:PORT")
    parser.add_argument("--cpu", action="store_true", help="measure gloo even where there is a GPU")
    args = parser.parse_args()
    try:
        node = Node.of(args.node)
        interface = name_interfaces(node.host, os.environ)
        backend = "nccl" if torch.cuda.is_available() and not args.cpu else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{node.host}:{node.port}", rank=node.index,
                                world_size=node.count, timeout=timedelta(seconds=_MEET_S))
        payload = torch.zeros(_BYTES[backend] // 4, device="cuda" if backend == "nccl" else "cpu")
        rate, times = measure(payload, node.count)
        dist.destroy_process_group()
    except SparktuneError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    except (RuntimeError, ValueError) as error:
        print(f"The machines should measure their link; it failed: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if node.index == 0:
        answer = {"backend": backend, "bytes_per_s": rate, "payload": _BYTES[backend], "times": times,
                  "interface": interface, "ranks": node.count}
        print(MEASURED + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
