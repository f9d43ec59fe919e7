"""float32 arithmetic over the bytes of bf16, f16 and f32 tensors, with numpy alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["FLOAT_BYTES", "from_float32", "to_float32"]

FLOAT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
"""safetensors dtypes that a merge can update, and their size in bytes."""


def to_float32(raw: bytes | bytearray | memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """Returns the values of little-endian `raw` as float32 (exact for all three types).

    Args:
        raw: the tensor's bytes.
        dtype: BF16, F16 or F32.
    """
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Rounds float32 values once, to nearest with ties to even, and returns the little-endian bytes.

    Args:
        values: contiguous float32, finite.
        dtype: BF16, F16 or F32.

    Raises:
        OverflowError: a value is not finite, or not representable in `dtype`.
    """
    if not np.isfinite(values).all():
        raise OverflowError("a value is not finite")
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.isfinite(half).all():
            raise OverflowError(f"a value of {np.abs(values).max():.3g} exceeds float16's 65504")
        return half.tobytes()
    bits = values.view(np.uint32)
    # Adding 0x7fff plus the last kept bit carries into the kept half exactly when nearest-even rounds up.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise OverflowError(f"a value of {np.abs(values).max():.3g} exceeds bfloat16's range")
    return rounded.tobytes()
