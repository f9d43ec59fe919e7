"""What the native engine needs of a GPU, looked at before a model is loaded into it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch

from sparktune.setup.plan.errors import PreflightError

__all__ = ["check_card"]

BFLOAT16_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 products; what PyTorch emulates below takes several times as long as float32."""


def check_card(device: torch.device, dtype: torch.dtype, try_kernel: Callable[[torch.device], object] | None = None
               ) -> None:
    """Refuses a GPU that cannot run the kernels of a plan. A CPU needs none of them.

    Args:
        device: where the model will live.
        dtype: compute type of the plan.
        try_kernel: compiles and launches one small Triton kernel; the default does.

    Raises:
        PreflightError: no bfloat16, or Triton cannot compile for this card.
    """
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    card = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if dtype == torch.bfloat16 and capability < BFLOAT16_CAPABILITY:
        raise PreflightError(
            f"--dtype bfloat16 needs a GPU of compute capability 8.0 or more; {card} has no bfloat16 products. Pass "
            "--dtype float32, which is slower and needs twice the memory, or use a newer GPU."
        )
    if dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return  # the references serve these, and the choice of each op says so
    try:
        (try_kernel or _try_kernel)(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton, its assembler, the C compiler it calls or the driver says
        said = str(error).strip().splitlines() or [""]
        raise PreflightError(
            f"Triton {importlib.metadata.version('triton')} cannot compile for {card}: {type(error).__name__}: "
            f"{said[0][:200]}. The native engine's kernels need it: install gcc if it is missing, or a torch whose "
            "Triton knows this card, or pass --engine unsloth, or --device cpu."
        ) from error


def _try_kernel(device: torch.device) -> None:
    from sparktune.kernels.silu_mul.triton import silu_mul_fwd

    x = torch.ones((1, 16), dtype=torch.float32, device=device)
    silu_mul_fwd(x, x)
    torch.cuda.synchronize(device)
