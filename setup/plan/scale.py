"""What several GPUs cost beside their arithmetic: bytes on the link, and the share of a step that they take. Pure.

Collectives send as a ring does: an all-reduce 2 (n - 1) / n of its payload from every rank, a gather or a
reduce-scatter (n - 1) / n. docs/scale.md holds this model against measured points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparktune.setup.plan.memory import adapter_parameters
from sparktune.setup.plan.schema import ModelSpec, Plan

__all__ = ["BUCKET_BYTES", "Link", "Traffic", "step_seconds", "traffic"]

BUCKET_BYTES = 64 * 2**20
"""Gradients summed at a time: large enough for the link's full speed, small beside what a step keeps."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins two ranks."""

    name: str
    bytes_per_s: float
    """What a large collective reaches, in one direction."""
    latency_s: float
    """Of one message."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends in one step."""

    gathered: float
    """Weights of blocks, gathered while others are computed; 0 where every rank has the model whole."""
    summed: float
    """Gradients, once a step."""
    messages: int
    """Sent one after the other."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.gathered + self.summed


def traffic(plan: Plan, spec: ModelSpec, ranks: int, passes: int, *, gloo: bool = False) -> Traffic:
    """Returns what one rank sends in a step.

    Args:
        plan: decides the method and the rank; full fine-tuning is spread, adapters are not.
        spec: the model.
        ranks: how many train together.
        passes: micro-batches of one rank in a step.
        gloo: processes on CPUs: gloo makes a reduce-scatter of an all-reduce, which sends twice as much.
    """
    if ranks == 1:
        return Traffic(gathered=0.0, summed=0.0, messages=0)
    share = (ranks - 1) / ranks
    if plan.mode != "full":
        payload = 4.0 * adapter_parameters(spec, plan.lora_r or 16, plan.target_modules)
        buckets = math.ceil(payload / BUCKET_BYTES)
        return Traffic(gathered=0.0, summed=2 * share * payload, messages=2 * (ranks - 1) * buckets)
    width = 4 if plan.dtype == "float32" else 8 if plan.dtype == "float64" else 2
    # Blocks forward and backward; embedding and head stay between the two.
    ends = spec.end_parameters
    gathered = share * width * passes * (2 * (spec.parameters - ends) + ends)
    wide = max(4, width)
    messages = (ranks - 1) * (spec.num_layers + 1) * (2 * passes + 1)
    summed = share * wide * spec.parameters * (2 if gloo else 1)
    return Traffic(gathered=gathered, summed=summed, messages=messages)


def step_seconds(compute_s: float, sent: Traffic, link: Link, *, passes: int, imbalance: float = 1.0) -> float:
    """Returns a step's time on several ranks: an estimate.

    Gathers of the next block overlap the computation of this one, so the longer of the two counts. The sum of adapters'
    gradients waits for the last pass; that of a spread model overlaps the backward part (two thirds) of the last pass.

    Args:
        compute_s: one rank's arithmetic in the step, without the others.
        sent: from `traffic`.
        link: between the ranks.
        passes: micro-batches of one rank in a step.
        imbalance: the busiest rank's cost over the mean.
    """
    computing = compute_s * imbalance
    gathering = sent.gathered / link.bytes_per_s
    summing = sent.summed / link.bytes_per_s
    if sent.gathered:
        summing = max(0.0, summing - computing / passes * 2 / 3)
    return max(computing, gathering) + summing + sent.messages * link.latency_s
