"""RMSNorm, alone and after the residual sum."""

from sparktune.kernels.rms_norm.reference import add_rms_norm_reference, rms_norm_reference

__all__ = ["add_rms_norm_reference", "rms_norm_reference"]
