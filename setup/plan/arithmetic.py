"""How much arithmetic a token of training costs: the unit in which speeds of different models can be compared. Pure.

A product [m, k] x [k, n] counts 2 m n k. A forward pass costs 2 FLOP a token and weight; the backward pass as much
again for the gradient of the input, and as much again where the weight itself learns. Attention by document costs what
its pairs of tokens cost: 4 FLOP a pair and query channel forward, 14 with the backward pass (scores computed again).
"""

from __future__ import annotations

from sparktune.setup.plan.memory import adapter_parameters, projection_shapes
from sparktune.setup.plan.schema import ModelSpec, Plan

__all__ = ["forward_flop", "training_flop"]

_CHUNK = 64
"""Tokens a chunk of the delta rule."""


def _mixing_flop(spec: ModelSpec, document: float) -> float:
    """FLOP a token that no weight explains, forward: attention's pairs and the delta rule's states.

    Args:
        spec: the model.
        document: mean length, in tokens, of the document that a token is in.
    """
    linear = spec.layer_types.count("linear_attention")
    reach = [min(document, spec.sliding_window or document) if kind == "sliding_attention" else document
             for kind in spec.layer_types if kind != "linear_attention"]
    attention = sum(4.0 * spec.num_heads * spec.head_dim * length / 2 for length in reach)
    keys, values = spec.gdn_key_dim, spec.gdn_value_dim
    rule = 2.0 * spec.gdn_value_heads * (_CHUNK * (3 * keys + 2 * values) + 3 * keys * values)
    return attention + linear * rule


def _weights(spec: ModelSpec) -> float:
    """Weights of the layers that multiply every token."""
    return float(sum(count * rows * columns for count, rows, columns in projection_shapes(spec).values()))


def forward_flop(spec: ModelSpec, *, document: float, head_share: float = 1.0) -> float:
    """Returns the FLOP of one token's forward pass.

    Args:
        spec: the model.
        document: mean length of the document that a token is in.
        head_share: share of the tokens that are projected onto the vocabulary.
    """
    head = 2.0 * spec.hidden_size * spec.vocab_size * head_share
    return 2.0 * _weights(spec) + _mixing_flop(spec, document) + head


def training_flop(plan: Plan, spec: ModelSpec, *, document: float, supervised_share: float) -> float:
    """Returns the FLOP that one token of training costs, without what a recompute policy computes twice.

    Args:
        plan: decides the method and the rank.
        spec: the model.
        document: mean length of the document that a token is in.
        supervised_share: share of the tokens that reach the head (the native engine projects no other).
    """
    weights, mixing = _weights(spec), _mixing_flop(spec, document)
    head = 2.0 * spec.hidden_size * spec.vocab_size * supervised_share
    if plan.mode == "full":
        return 6.0 * weights + 3.5 * mixing + 3.0 * head
    adapters = adapter_parameters(spec, plan.lora_r or 16, plan.target_modules)
    return 4.0 * weights + 6.0 * adapters + 3.5 * mixing + 2.0 * head
