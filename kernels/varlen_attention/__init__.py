"""Causal attention, grouped heads, each document for itself."""

from sparktune.kernels.varlen_attention.reference import varlen_attention_reference

__all__ = ["varlen_attention_reference"]
