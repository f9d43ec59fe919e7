"""How a plan's frozen base is stored: in the compute type, in NF4, or in int8. Pure."""

from __future__ import annotations

from typing import Literal

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.schema import Plan

__all__ = ["BYTES_A_WEIGHT", "BaseStorage", "base_storage", "check_base_storage"]

BaseStorage = Literal["none", "nf4", "int8"]

BYTES_A_WEIGHT = {"nf4": 0.5 + 4 / 64, "nf4 double": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Of a quantised projection: NF4 in blocks of 64 with float32 scales, the same with eight-bit scales in blocks of 256,
int8 (whose four bytes a row are nothing beside a row)."""


def base_storage(plan: Plan) -> BaseStorage:
    """Returns how the base is stored: as --quantise-base says; left at auto, NF4 under --mode qlora."""
    if plan.quantise_base != "auto":
        return plan.quantise_base
    return "nf4" if plan.mode == "qlora" else "none"


def check_base_storage(plan: Plan) -> None:
    """Refuses a method and a storage that contradict each other.

    Raises:
        UsageError: full fine-tuning of a quantised base, or QLoRA on one that is not.
    """
    storage = base_storage(plan)
    if plan.mode == "full" and storage != "none":
        raise UsageError(
            f"--mode full trains every weight, which --quantise-base {storage} would round away. Use --mode qlora, or "
            "leave --quantise-base out."
        )
    if plan.mode == "qlora" and storage == "none":
        raise UsageError(
            "--mode qlora is LoRA on a quantised base, and --quantise-base none asks for one that is not. Use "
            "--mode lora, or --quantise-base nf4 or int8."
        )
