"""silu(x Wg^T) * (x Wu^T) in one launch: kept as a negative result (docs/lab-log.md)."""

from sparktune.lab.kernels.fused_swiglu_mm.kernel import SwigluTile, fused_swiglu_mm

__all__ = ["SwigluTile", "fused_swiglu_mm"]
