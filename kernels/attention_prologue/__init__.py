"""Between the projections and the attention: gate split, q/k norm, rotary embedding."""

from sparktune.kernels.attention_prologue.reference import attention_prologue_reference

__all__ = ["attention_prologue_reference"]
