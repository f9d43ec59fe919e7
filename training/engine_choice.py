"""Which engine a run trains with: decided before torch is imported, for Unsloth must be imported before transformers.

The policy is pure; what it knows of speeds is `MEASURED`, one row a chip and method, from benches of both engines in
one sitting (lab/side_by_side.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparktune.setup.plan.config import load_plan, read_config, resolve
from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Machine, ModelSpec

__all__ = ["MEASURED", "Choice", "Measurement", "choose_engine", "engine_of_command", "load_unsloth"]

EngineName = Literal["native", "unsloth"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Both engines on one chip, in one sitting."""

    capability: tuple[int, int]
    """Compute capability of the chip."""
    model_type: str
    mode: Literal["lora", "full"]
    native_tok_per_s: float
    unsloth_tok_per_s: float
    """The faster of Unsloth's settings."""
    source: str
    """Where the figures come from: chip, date, file."""


MEASURED: tuple[Measurement, ...] = (
    Measurement(
        capability=(9, 0), model_type="qwen3_5_text", mode="lora", native_tok_per_s=81169.0, unsloth_tok_per_s=25737.0,
        source="NVIDIA H200, Qwen3.5-0.8B shape, rows of 5376 tokens, 2026-11-22, docs/results/side_by_side.csv",
    ),
)
"""Chips measured with both engines in one sitting."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An engine and why."""

    engine: EngineName
    reason: str


def choose_engine(
    spec: ModelSpec, machine: Machine, measurements: Sequence[Measurement], *, mode: str, unsloth_installed: bool,
    unmeasured: EngineName = "unsloth",
) -> Choice:
    """Chooses the engine for `--engine auto`: native wherever it is supported and measured faster on this chip.

    Args:
        spec: the model.
        machine: `device` and `capability` are read.
        measurements: both engines' speeds by chip, family and method.
        mode: lora, qlora, full or auto (as lora).
        unsloth_installed: the package can be imported here.
        unmeasured: what a chip without a measurement gets.
    """
    if not spec.native:
        return Choice(engine="unsloth", reason=f"the native engine cannot train this model: {spec.native_reason}")
    if machine.device == "cpu":
        return Choice(engine="native", reason="Unsloth needs a CUDA GPU, the native engine does not")
    if mode == "qlora":
        return Choice(engine="unsloth", reason="the native engine has no 4-bit base")
    if not unsloth_installed:
        return Choice(engine="native", reason=f"it knows {spec.model_type}, and unsloth is not installed")
    method = "full" if mode == "full" else "lora"
    for row in measurements:
        if (row.capability, row.model_type, row.mode) == (machine.capability, spec.model_type, method):
            faster: EngineName = "native" if row.native_tok_per_s >= row.unsloth_tok_per_s else "unsloth"
            return Choice(
                engine=faster,
                reason=f"measured on this chip: native {row.native_tok_per_s:,.0f} tok/s, Unsloth "
                f"{row.unsloth_tok_per_s:,.0f} ({row.source})",
            )
    chip = "unknown" if machine.capability is None else ".".join(map(str, machine.capability))
    other = "unsloth" if unmeasured == "native" else "native"
    return Choice(
        engine=unmeasured,
        reason=f"no measurement of both engines for compute capability {chip}, and this version runs no duel of 20 "
        f"steps; --engine {other} takes the other one",
    )


def _machine() -> Machine:
    """Asks nvidia-smi for the first GPU, without importing torch; a machine without it counts as a CPU."""
    capability: tuple[int, int] | None = None
    if shutil.which("nvidia-smi") is not None:
        try:
            answer = subprocess.run(
                ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True,
                timeout=20, check=False,
            ).stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired):
            answer = []
        major, _, minor = answer[0].partition(".") if answer else ("", "", "")
        if major.isdigit() and minor.isdigit():
            capability = int(major), int(minor)
    return Machine(
        device="cuda" if capability else "cpu", capability=capability, memory_gib=0.0, cpu_cores=1, disk_free_gib=0.0
    )


def engine_of_command(flags: Mapping[str, Any], config: Path | None, env: Mapping[str, str]) -> Choice | None:
    """Returns the engine that a command line leads to; None where the session may settle or refuse it by itself.

    Args:
        flags: plan fields given on the command line.
        config: what --config names.
        env: the environment.
    """
    resume = flags.get("resume_from_checkpoint")
    try:
        own = Path(resume).resolve().parent / "plan.yaml" if resume else config
        if own is not None and own.name == "plan.yaml" and own.is_file():
            plan = load_plan(own)
            engine = flags.get("engine", plan.engine)
        else:
            plan = resolve(dict(flags), read_config(config) if config else {}, env, {})
            engine = plan.engine
        if engine != "auto":
            return Choice(engine=engine, reason="as asked for")
        installed = importlib.util.find_spec("unsloth") is not None
        if not installed or plan.data is None:
            return None  # nothing to import first, and probing a model may ask the hub
        if plan.device == "cpu":
            machine = Machine(device="cpu", memory_gib=0.0, cpu_cores=1, disk_free_gib=0.0)
        else:
            machine = _machine()
        # as setup/plan/recommend.py decides for a run of the whole journey, whose rows hold several documents
        return choose_engine(
            probe(plan.model), machine, MEASURED, mode=plan.mode, unsloth_installed=installed, unmeasured="native"
        )
    except SparktuneError:
        return None  # the session reads the same files and says what is wrong with them


def load_unsloth() -> Any:
    """Imports unsloth, which must happen before transformers is imported, and returns the module.

    Raises:
        PreflightError: it is not installed, or it refuses this machine.
    """
    if importlib.util.find_spec("unsloth") is None:
        raise PreflightError(
            "The Unsloth engine needs the package unsloth, which this Python does not have. Train in the image "
            "(--backend docker), or use --engine native with a model that it knows."
        )
    try:
        return importlib.import_module("unsloth")
    except Exception as error:  # it raises whatever its patches meet: no GPU, a version it does not know
        first = str(error).strip().splitlines()
        raise PreflightError(
            f"unsloth is installed but does not start here: {type(error).__name__}: "
            f"{first[0] if first else 'no reason given'}. It needs a CUDA GPU and the versions of its stack. "
            "Use --engine native with a model that it knows."
        ) from error
