"""A frozen group of projections with LoRA adapters, in one product."""

from sparktune.kernels.lora_linear.reference import lora_linear_reference

__all__ = ["lora_linear_reference"]
