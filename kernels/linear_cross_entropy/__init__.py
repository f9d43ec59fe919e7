"""Output projection and cross-entropy in one, for the supervised rows only."""

from sparktune.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy_reference"]
