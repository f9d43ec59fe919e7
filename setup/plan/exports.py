"""What this release can export: asked when a run is planned, so that nobody trains for hours towards a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.schema import Plan

__all__ = ["BYTES_PER_WEIGHT", "GGUF_TYPES", "check_exports", "check_gguf_types", "check_mtp_mode"]

BYTES_PER_WEIGHT = {"bf16": 2.0, "f16": 2.0, "f32": 4.0, "q8_0": 34 / 32}
"""GGUF type -> bytes a weight, for the types that llama.cpp's converter writes without compiled code."""
GGUF_TYPES = tuple(BYTES_PER_WEIGHT)

_QUANTISER_TYPES = frozenset({
    "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q2_k_s", "q3_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k", "q4_k_s", "q4_k_m",
    "q5_k", "q5_k_s", "q5_k_m", "q6_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs",
    "iq3_s", "iq3_m", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4_moe", "mxfp4", "nvfp4",
})


def check_gguf_types(types: Sequence[str]) -> None:
    """Checks the GGUF types asked for.

    Raises:
        UsageError: a type needs the compiled quantiser (a later release), or is unknown, or is given twice.
    """
    compiled = [t for t in types if t.lower() in _QUANTISER_TYPES]
    if compiled:
        raise UsageError(
            f"--gguf {','.join(compiled)} needs llama.cpp's compiled quantiser, which comes with a later release. "
            f"Without a compiler there are {', '.join(GGUF_TYPES)}; q8_0 is the smallest. You can quantise a bf16 file "
            "yourself with llama-quantize."
        )
    unknown = [t for t in types if t not in GGUF_TYPES]
    if unknown:
        raise UsageError(f"--gguf takes {', '.join(GGUF_TYPES)}, or none; got {unknown[0]!r}.")
    if len(set(types)) != len(types):
        raise UsageError(f"--gguf should name each type once; got {','.join(types)}.")


def check_mtp_mode(mode: str) -> None:
    """Raises UsageError for an MTP mode that this release cannot do."""
    if mode == "trained":
        raise UsageError(
            "--mtp trained: training the MTP head on your data comes with a later release. Use --mtp default (the "
            "base's own head) or --mtp skip."
        )


def check_exports(plan: Plan) -> None:
    """Refuses a plan that asks for what only a later release can export.

    Raises:
        UsageError: says what is missing and what there is instead.
    """
    check_gguf_types(plan.gguf)
    check_mtp_mode(plan.mtp)
