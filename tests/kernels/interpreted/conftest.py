"""Three corrections to Triton 3.6's interpreter, so that it computes what a GPU computes.

It rounds fp32 to bf16 toward zero where hardware rounds to nearest even, it multiplies the bit patterns of bf16
matrices instead of their values, and it turns a scalar into a loop bound in a way that NumPy 2.4 refuses. These modules
run in a process of their own with TRITON_INTERPRET=1 (tests/kernels/test_triton_numerics.py starts it), because that
variable must be set before Triton is imported.
"""

import os

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor
_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot


def _patch_with_index(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_to_nearest(data, source, target, rounding_mode):
    if source != tl.float32 or target != tl.bfloat16:
        return _convert(data, source, target, rounding_mode)
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # a NaN's payload may carry into the sign: keep it a quiet NaN
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded).reshape(data.shape)


def _widened(x):
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot_of_values(self, a, b, d, input_precision, max_num_imprecise_acc):
    return _dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter._patch_lang_tensor = _patch_with_index
    interpreter._convert_float = _convert_to_nearest
    interpreter.InterpreterBuilder.create_dot = _dot_of_values
