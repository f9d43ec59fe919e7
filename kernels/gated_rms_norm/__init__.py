"""RMSNorm over a head, gated by silu(z)."""

from sparktune.kernels.gated_rms_norm.reference import gated_rms_norm_reference

__all__ = ["gated_rms_norm_reference"]
