"""Depthwise causal convolution with silu, restarted at every document."""

from sparktune.kernels.causal_conv1d.reference import causal_conv1d_reference

__all__ = ["causal_conv1d_reference"]
