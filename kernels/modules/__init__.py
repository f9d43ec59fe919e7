"""The nn.Modules built on the ops."""

from sparktune.kernels.modules.attention import Attention
from sparktune.kernels.modules.full_ft import FullFT_BF16_Linear
from sparktune.kernels.modules.gated_delta_net import GatedDeltaNet
from sparktune.kernels.modules.gated_mlp import GatedMLP
from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.modules.recompute import RecomputedOutputs
from sparktune.kernels.modules.row import DropoutKey, Row
from sparktune.kernels.modules.static_lora import StaticLoRA

__all__ = [
    "Attention", "DropoutKey", "FullFT_BF16_Linear", "GatedDeltaNet", "GatedMLP", "ProjectionGroup",
    "RecomputedOutputs", "Row", "StaticLoRA",
]
