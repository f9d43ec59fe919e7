"""Which implementation each op uses: chosen once, when the model is built, with the reason.

To add a fused implementation, put its function behind the reference's signature into `kernels/<op>/function.py` and add
one `Candidate` to `FUSED` in kernels/candidates.py; candidates are asked in order, and the reference is what remains.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparktune.kernels.attention_prologue.reference import attention_prologue_reference
from sparktune.kernels.candidates import FUSED, Candidate
from sparktune.kernels.causal_conv1d.reference import causal_conv1d_reference
from sparktune.kernels.gated_delta_rule.reference import gated_delta_rule_reference, gdn_gates_reference
from sparktune.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from sparktune.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from sparktune.kernels.lora_linear.reference import lora_linear_reference
from sparktune.kernels.rms_norm.reference import add_rms_norm_reference, rms_norm_reference
from sparktune.kernels.shape import ModelShape
from sparktune.kernels.sigmoid_gate.reference import sigmoid_gate_reference
from sparktune.kernels.silu_mul.reference import silu_mul_reference
from sparktune.kernels.varlen_attention.reference import varlen_attention_reference

__all__ = ["OPS", "Candidate", "OpTable", "reference_ops", "select_ops", "used_ops"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpTable:
    """One callable an op; signatures in docs/architecture.md."""

    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gated_rms_norm: Callable[..., torch.Tensor]
    silu_mul: Callable[..., torch.Tensor]
    attention_prologue: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
    sigmoid_gate: Callable[..., torch.Tensor]
    causal_conv1d: Callable[..., torch.Tensor]
    gdn_gates: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gated_delta_rule: Callable[..., torch.Tensor]
    varlen_attention: Callable[..., torch.Tensor]
    linear_cross_entropy: Callable[..., torch.Tensor]
    lora_linear: Callable[..., torch.Tensor]
    reasons: dict[str, str]
    """Op -> the implementation chosen and why."""
    replayable: frozenset[str] = frozenset()
    """Ops whose launches a CUDA graph may replay over another packing (`Candidate.replayable`)."""


_REFERENCES: dict[str, Callable[..., object]] = {
    "rms_norm": rms_norm_reference,
    "add_rms_norm": add_rms_norm_reference,
    "gated_rms_norm": gated_rms_norm_reference,
    "silu_mul": silu_mul_reference,
    "attention_prologue": attention_prologue_reference,
    "sigmoid_gate": sigmoid_gate_reference,
    "causal_conv1d": causal_conv1d_reference,
    "gdn_gates": gdn_gates_reference,
    "gated_delta_rule": gated_delta_rule_reference,
    "varlen_attention": varlen_attention_reference,
    "linear_cross_entropy": linear_cross_entropy_reference,
    "lora_linear": lora_linear_reference,
}
OPS = tuple(_REFERENCES)
"""Names of all ops."""


def used_ops(spec: ModelShape) -> frozenset[str]:
    """Returns the ops that a tower of this shape calls: a dense model has no delta rule, and so on."""
    kinds = set(spec.layer_types)
    unused: set[str] = set()
    if "linear_attention" not in kinds:
        unused |= {"gated_rms_norm", "causal_conv1d", "gdn_gates", "gated_delta_rule"}
    if kinds <= {"linear_attention"}:
        unused |= {"attention_prologue", "varlen_attention", "sigmoid_gate"}
    elif not spec.attention_gate:
        unused.add("sigmoid_gate")
    return frozenset(OPS) - unused


def _choose(
    op: str, device: torch.device, dtype: torch.dtype, spec: ModelShape
) -> tuple[Callable[..., object], str, bool]:
    if op not in used_ops(spec):
        return _REFERENCES[op], "reference (this model has no layer that calls it)", False
    refused = []
    for candidate in FUSED.get(op, ()):
        objection = candidate.objection(device, dtype, spec)
        if not objection:
            function = getattr(importlib.import_module(candidate.module), candidate.function)
            return function, "; ".join([f"{candidate.name} on {device.type}", *refused]), candidate.replayable
        refused.append(f"not {candidate.name}: {objection}")
    why = "; ".join(refused) if refused else f"no fused implementation for {device.type}"
    return _REFERENCES[op], f"reference ({why})", False


def select_ops(device: torch.device, dtype: torch.dtype, spec: ModelShape) -> OpTable:
    """Chooses an implementation for every op and logs each choice once.

    Args:
        device: where the model runs.
        dtype: compute type of the activations.
        spec: shape of the model.
    """
    chosen = {op: _choose(op, device, dtype, spec) for op in OPS}
    for op, (_, reason, _) in chosen.items():
        _log.info("%s: %s", op, reason)
    return OpTable(
        **{op: function for op, (function, _, _) in chosen.items()},
        reasons={op: why for op, (_, why, _) in chosen.items()},
        replayable=frozenset(op for op, (_, _, replayable) in chosen.items() if replayable),
    )


def reference_ops() -> OpTable:
    """Returns the references for every op: the oracle, on any device."""
    return OpTable(**_REFERENCES, reasons=dict.fromkeys(OPS, "reference (asked for)"))
