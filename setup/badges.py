"""What the model screen says of a size: bytes to fetch, whether LoRA and full fine-tuning fit here, expected speeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sparktune.setup import strings
from sparktune.setup.ask import Option
from sparktune.setup.plan.arithmetic import training_flop
from sparktune.setup.plan.memory import predict_peak
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.schema import Machine, ModelSpec, Plan
from sparktune.setup.plan.speeds import rate_for

__all__ = ["Fit", "fit_of", "model_options", "speed_of"]

Method = Literal["lora", "full"]
_METHODS: tuple[tuple[str, Method], ...] = (("LoRA", "lora"), ("full", "full"))
_ANCHOR = "Qwen/Qwen3.5-2B"
_TOKENS = 4096
_LEAST_TOKENS = 2048
_EIGHT_BIT_PARAMETERS = 4_000_000_000
_FILES_GB = {
    "Qwen/Qwen3.5-0.8B": 1.8, "Qwen/Qwen3.5-2B": 4.4, "Qwen/Qwen3.5-4B": 9.0, "Qwen/Qwen3.5-9B": 18.0,
    "Qwen/Qwen3.5-27B": 54.0,
}
"""bf16 weight files, published; vision tower and MTP head included."""
_DOCUMENT, _SUPERVISED = 2048.0, 0.35
"""What the speeds are shown for: documents of this many tokens, of which this share is learned."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a method fits, by estimate."""

    level: Literal["good", "tight", "bad"]
    """good: nothing has to be computed again; tight: only with recomputation and short packs; bad: not at all."""
    gib: float
    """Memory it takes at that level, in GiB."""


def _trial(spec: ModelSpec, machine: Machine, mode: Method) -> Plan:
    eight_bit = mode == "full" and spec.parameters > _EIGHT_BIT_PARAMETERS and machine.device == "cuda"
    return Plan.model_validate({
        "mode": mode, "lora_r": 32, "optimizer": "adamw_8bit" if eight_bit else "adamw", "engine": "native",
        "dtype": "bfloat16" if machine.device == "cuda" else "float32",
    })


def fit_of(spec: ModelSpec, machine: Machine, mode: Method) -> Fit:
    """Returns whether `mode` fits on `machine`: at 4096 tokens without recomputation, else at 2048 with it."""
    plan = _trial(spec, machine, mode)
    easy = predict_peak(plan, spec, machine, tokens=_TOKENS, longest=_TOKENS, policy="none").total_gib
    if easy <= machine.memory_gib:
        return Fit(level="good", gib=easy)
    least = predict_peak(plan, spec, machine, tokens=_LEAST_TOKENS, longest=_LEAST_TOKENS, policy="layer").total_gib
    return Fit(level="tight" if least <= machine.memory_gib else "bad", gib=least)


def speed_of(spec: ModelSpec, machine: Machine, mode: Method) -> tuple[float, str] | None:
    """Returns the expected tok/s of training and where that figure comes from; None where nothing is known."""
    plan = _trial(spec, machine, mode)
    rate = rate_for(plan, spec, machine)
    if rate is None:
        return None
    return rate.flop_per_s / training_flop(plan, spec, document=_DOCUMENT, supervised_share=_SUPERVISED), rate.reason


def _badge(word: str, fit: Fit, speed: float | None) -> list[tuple[str, str]]:
    mark = {"good": strings.FITS, "tight": strings.TIGHT, "bad": strings.TOO_BIG}[fit.level]
    rate = f"{_two_digits(speed):>6,}/s" if speed and fit.level != "bad" else " " * 8
    return [("", f"  {word} "), (f"class:{fit.level}", f"{mark:<5} {fit.gib:>3.0f}G"), ("", f" {rate}")]


def _two_digits(value: float) -> int:
    return int(round(value, 1 - math.floor(math.log10(value)))) if value >= 10 else round(value)


def model_options(machine: Machine) -> tuple[list[Option], str]:
    """Returns the catalogue's sizes as options of a list, each with its badges, and what the figures are."""
    options: list[Option] = []
    about = strings.SPEEDS_NONE
    width = max(len(m.partition("/")[2]) for m in CATALOGUE)
    for model, config in CATALOGUE.items():
        spec = spec_from_config(config, model)
        parts = [("", f"{model.partition('/')[2]:<{width}} {_FILES_GB[model]:>5.1f} GB")]
        for word, mode in _METHODS:
            found = speed_of(spec, machine, mode)
            parts += _badge(word, fit_of(spec, machine, mode), found[0] if found else None)
            if found and model == _ANCHOR and mode == "lora":
                about = strings.SPEEDS.format(reason=found[1])
        options.append((model, parts))
    return options, f"{about} {strings.BADGES}"
