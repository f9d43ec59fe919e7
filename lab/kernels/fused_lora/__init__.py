"""A LoRA projection's forward pass as one launch, and the dispatcher that says for which shapes it could win."""

from sparktune.lab.kernels.fused_lora.kernel import LoraTile, fused_lora
from sparktune.lab.kernels.fused_lora.v3_hybrid import Choice, choose, hybrid_lora

__all__ = ["Choice", "LoraTile", "choose", "fused_lora", "hybrid_lora"]
