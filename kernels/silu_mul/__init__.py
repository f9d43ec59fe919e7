"""The MLP's activation: silu(gate) * up."""

from sparktune.kernels.silu_mul.reference import silu_mul_reference

__all__ = ["silu_mul_reference"]
