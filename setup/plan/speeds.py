"""Measured training speeds, each with its chip, engine and source; and what they say about a plan that nobody has run.

Speeds of different models are compared as FLOP a second (setup/plan/arithmetic.py): between two measured sizes the rate
is interpolated over the logarithm of the weights, beyond them it stays. A machine's own runs
(setup/machine/speedbook.py) go before what we measured elsewhere on the same chip, and that before published figures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sparktune.setup.plan.arithmetic import training_flop
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.schema import Machine, ModelSpec, Plan

__all__ = ["BUILT_IN", "Rate", "Speed", "chip_of", "rate_for"]

Source = Literal["own", "measured", "published"]


class Speed(BaseModel):
    """One run's speed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chip: str
    """As the driver names it; for a CPU its name and the number of cores."""
    engine: Literal["native", "unsloth"]
    mode: Literal["lora", "qlora", "full"]
    dtype: str
    recompute: str
    parameters: int
    """Of the text tower."""
    flop_per_s: float
    """Tokens a second times the FLOP of one token (arithmetic.training_flop)."""
    source: Source
    origin: str
    """Where the figure comes from, for people."""
    document: float | None = None
    """Mean tokens of a document, and"""
    micro_tokens: float | None = None
    """real tokens of a micro-batch; None where not known."""

    def unlike(self, document: float | None, micro_tokens: float | None) -> float:
        """Returns how far this run's shape is from another: the squared distance of the logarithms; 0 if unknown."""
        pairs = ((self.document, document), (self.micro_tokens, micro_tokens))
        return sum(math.log(own / asked) ** 2 for own, asked in pairs if own and asked)


class Rate(BaseModel):
    """What a plan is expected to reach."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flop_per_s: float
    low: float
    """Times `flop_per_s`: the slowest that is still expected."""
    high: float
    """Times `flop_per_s`: the fastest that is still expected."""
    reason: str
    same_shape: bool = False
    """One of the machine's own runs had documents and micro-batches of this size."""


def chip_of(machine: Machine) -> str:
    """Returns the name under which a machine's speeds are kept."""
    if machine.device == "cuda":
        return machine.gpu_name or "a CUDA GPU"
    return f"{machine.cpu_name or 'CPU'}, {machine.cpu_cores} cores"


def _anchor(
    chip: str, engine: Literal["native", "unsloth"], mode: Literal["lora", "full"], size: str, tok_per_s: float,
    document: float, supervised: float, recompute: str, source: Source, origin: str, rank: int = 128,
) -> Speed:
    """A known figure, turned into a rate with the same arithmetic that will read it."""
    name = f"Qwen/Qwen3.5-{size}"
    spec = spec_from_config(CATALOGUE[name], name)
    plan = Plan.model_validate({"mode": mode, "lora_r": rank})
    flop = training_flop(plan, spec, document=document, supervised_share=supervised)
    return Speed(
        chip=chip, engine=engine, mode=mode, dtype="bfloat16", recompute=recompute, parameters=spec.parameters,
        flop_per_s=tok_per_s * flop, source=source, origin=origin,
    )


def _published(size: str, tok_per_s: float, document: float, mode: Literal["lora", "full"] = "lora") -> Speed:
    # Unsloth projects every token onto the vocabulary, but the plan that asks does not know that: 0.35 for both
    return _anchor("NVIDIA GB10", "unsloth", mode, size, tok_per_s, document, 0.35, "layer", "published",
                   f"published, DGX Spark, Unsloth with the SSM fast path, {size}")


def _ours(size: str, tok_per_s: float, recompute: str = "none", mode: Literal["lora", "full"] = "lora") -> Speed:
    return _anchor("NVIDIA H200", "native", mode, size, tok_per_s, 5376, 0.35, recompute, "measured",
                   f"measured, one H200, {size} (docs/results/side_by_side.csv)")


def _theirs(size: str, tok_per_s: float, recompute: str, mode: Literal["lora", "full"] = "lora") -> Speed:
    return _anchor("NVIDIA H200", "unsloth", mode, size, tok_per_s, 5376, 0.35, recompute, "measured",
                   f"measured, one H200, Unsloth 2026.5.2, {size} (docs/results/side_by_side.csv)")


BUILT_IN: tuple[Speed, ...] = (
    _published("0.8B", 5650, 2048), _published("2B", 3568, 2048), _published("4B", 1712, 2048),
    _published("9B", 1095, 2048), _published("27B", 370, 1024), _published("2B", 3461, 3000),
    _published("2B", 3173, 3000, "full"),
    _ours("0.8B", 81_169), _ours("2B", 52_563), _ours("4B", 22_347), _ours("2B", 37_508, "layer"),
    _ours("2B", 41_244, "none", "full"),
    _theirs("0.8B", 25_737, "none"), _theirs("2B", 23_132, "none"), _theirs("2B", 19_754, "layer"),
)
"""What is known without having run anything on the machine at hand."""

_SPREAD: dict[Source, tuple[float, float]] = {"own": (0.80, 1.15), "measured": (0.75, 1.25), "published": (0.70, 1.30)}
"""How far a rate may be off, by source: (slowest, fastest) as a factor."""
_NEAR, _FAR = 0.05, 1.0
"""Squared distances of two runs' shapes (`Speed.unlike`): as good as the same, and a guess. 1.0: 2.7 times the size."""
_CPU_FLOP_PER_CORE = 8e9
"""float32 training of a small model by the references, a core: a guess until the machine has run once."""


def rate_for(
    plan: Plan, spec: ModelSpec, machine: Machine, book: Sequence[Speed] = (), *, document: float | None = None,
    micro_tokens: float | None = None,
) -> Rate | None:
    """Returns the rate that the plan is expected to reach, or None where nothing is known of the chip.

    Short documents and small micro-batches reach less of a chip: of the machine's own runs, those count most whose
    documents and micro-batches are most like the plan's.

    Args:
        plan: with `mode`, `engine` and `dtype` decided.
        spec: the model.
        machine: where it will run.
        book: the machine's own runs, newest last.
        document: mean tokens of a document of the data.
        micro_tokens: real tokens of a micro-batch.
    """
    chip = chip_of(machine)
    engine = "unsloth" if plan.engine == "unsloth" else "native"
    known = [s for s in (*BUILT_IN, *book) if s.chip == chip and (machine.device == "cuda" or s.dtype == plan.dtype)]
    notes: list[str] = []
    for field, wanted, otherwise in (
        ("engine", engine, "the other engine's speed"), ("mode", plan.mode, "the other method's speed"),
    ):
        same = [s for s in known if getattr(s, field) == wanted]
        if same:
            known = same
        elif known:
            notes.append(f"{otherwise}, for want of one with {field} {wanted}")
    if not known:
        if machine.device == "cpu":
            return Rate(
                flop_per_s=_CPU_FLOP_PER_CORE * machine.cpu_cores, low=0.3, high=4.0,
                reason="a guess: this machine has not trained anything yet",
            )
        return None
    for source in ("own", "measured", "published"):
        chosen = [s for s in known if s.source == source]
        if chosen:
            break
    alike = [s for s in chosen if s.recompute == plan.recompute_choice] if plan.recompute != "auto" else []
    chosen = alike or chosen
    low, high = _SPREAD[chosen[0].source]
    if notes:
        low, high = low * 0.8, high * 1.6
    unlike = {s: s.unlike(document, micro_tokens) for s in chosen}
    if min(unlike.values()) > _FAR:
        low, high = low * 0.8, high * 1.3
    value = _interpolate(spec.parameters, _by_size(unlike))
    origins = "; ".join(dict.fromkeys(s.origin for s in _nearest(spec.parameters, chosen)))
    shown = source == "own" and min(unlike.values()) <= _NEAR
    return Rate(flop_per_s=value, low=low, high=high, reason="; ".join([origins, *notes]), same_shape=shown)


def _by_size(unlike: Mapping[Speed, float]) -> list[tuple[float, float]]:
    """(logarithm of the weights, mean rate), ascending. The newest eight of a size count, the more alike the more."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for speed, distance in unlike.items():
        groups.setdefault(speed.parameters, []).append((speed.flop_per_s, 1 / (_NEAR + distance)))
    return [
        (math.log(n), sum(rate * weight for rate, weight in found[-8:]) / sum(weight for _, weight in found[-8:]))
        for n, found in sorted(groups.items())
    ]


def _interpolate(parameters: int, points: Sequence[tuple[float, float]]) -> float:
    x = math.log(parameters)
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def _nearest(parameters: int, speeds: Sequence[Speed]) -> list[Speed]:
    """The newest speeds of the size nearest to `parameters`."""
    best = min(abs(math.log(s.parameters / parameters)) for s in speeds)
    return [s for s in speeds if abs(math.log(s.parameters / parameters)) <= best + 1e-9][-1:]
