"""Which engine trains where the plan leaves it open. Pure; the speeds it knows are those of setup/plan/speeds.py.

The recommendation (before a run) and train.py (in its own process) both ask here, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparktune.setup.plan.schema import Machine, ModelSpec
from sparktune.setup.plan.speeds import BUILT_IN, Speed, chip_of

__all__ = ["Choice", "EngineName", "choose_engine", "undecided"]

EngineName = Literal["native", "unsloth"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An engine and why."""

    engine: EngineName
    reason: str


def choose_engine(
    spec: ModelSpec, machine: Machine, *, mode: str, unsloth_installed: bool | None,
    speeds: Sequence[Speed] = BUILT_IN,
) -> Choice:
    """Chooses the engine for `--engine auto`: native wherever it is supported and not measured slower.

    Args:
        spec: the model.
        machine: `device` and `gpu_name` are read.
        mode: lora, qlora, full or auto; all but full are read as lora (a quantised base slows both engines alike).
        unsloth_installed: whether the package can be imported where the run trains; None where that is not known yet.
        speeds: of both engines, measured; only pairs of one chip, method and model size are compared.
    """
    if not spec.native:
        return Choice(engine="unsloth", reason=f"the native engine cannot train this model: {spec.native_reason}")
    if machine.device == "cpu":
        return Choice(engine="native", reason="Unsloth needs a CUDA GPU, the native engine does not")
    if unsloth_installed is False:
        return Choice(engine="native", reason=f"it knows {spec.model_type}, and unsloth is not installed")
    method = "full" if mode == "full" else "lora"
    pair = _nearest_pair(spec, [s for s in speeds if s.mode == method and s.source != "published"
                                and s.chip == chip_of(machine)])
    if pair is not None:
        native, other = pair
        ratio = native.flop_per_s / other.flop_per_s
        engine: EngineName = "native" if ratio >= 1 else "unsloth"
        said = f"native at {ratio:.1f} times Unsloth's speed"
        return Choice(engine=engine, reason=f"measured on this chip, {method}: {said} ({native.origin})")
    return Choice(
        engine="native",
        reason=f"it knows {spec.model_type} and packs it without leaks; nobody has measured both engines on "
        f"{chip_of(machine)} for {method} yet, --engine-duel does",
    )


def undecided(spec: ModelSpec, machine: Machine, *, mode: str, speeds: Sequence[Speed]) -> bool:
    """Says whether a duel would tell something: both engines could train it, and no pair of speeds is known."""
    method = "full" if mode == "full" else "lora"
    known = [s for s in speeds if s.mode == method and s.source != "published" and s.chip == chip_of(machine)]
    return spec.native and machine.device == "cuda" and _nearest_pair(spec, known) is None


def _nearest_pair(spec: ModelSpec, speeds: Sequence[Speed]) -> tuple[Speed, Speed] | None:
    """Returns the fastest native and the fastest Unsloth speed at the model size nearest to `spec` that has both."""
    sizes = {s.parameters for s in speeds if s.engine == "native"} & {
        s.parameters for s in speeds if s.engine == "unsloth"
    }
    if not sizes:
        return None
    size = min(sizes, key=lambda n: abs(n - spec.parameters))

    def fastest(engine: str) -> Speed:
        return max((s for s in speeds if s.engine == engine and s.parameters == size), key=lambda s: s.flop_per_s)

    return fastest("native"), fastest("unsloth")
