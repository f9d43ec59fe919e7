"""Which engine a run trains with: decided before torch is imported, for Unsloth must be imported before transformers.

The policy itself is setup/plan/engines.py, which the recommendation before a run asks too.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparktune.setup.plan.config import load_plan, read_config, resolve
from sparktune.setup.plan.engines import Choice, choose_engine, undecided
from sparktune.setup.plan.errors import PreflightError, SparktuneError
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Machine
from sparktune.setup.plan.speeds import BUILT_IN
from sparktune.training.duel import known_speeds, race

__all__ = ["Choice", "engine_of_command", "load_unsloth"]

def _machine() -> Machine:
    """Asks nvidia-smi for the first GPU, without importing torch; a machine without it counts as a CPU."""
    capability: tuple[int, int] | None = None
    name = None
    if shutil.which("nvidia-smi") is not None:
        try:
            answer = subprocess.run(
                ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"], capture_output=True, text=True,
                timeout=20, check=False,
            ).stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired):
            answer = []
        number, _, name = answer[0].partition(", ") if answer else ("", "", "")
        major, _, minor = number.partition(".")
        if major.isdigit() and minor.isdigit():
            capability = int(major), int(minor)
    return Machine(
        device="cuda" if capability else "cpu", gpu_name=name or None, capability=capability, memory_gib=0.0,
        cpu_cores=1, disk_free_gib=0.0,
    )


def engine_of_command(
    flags: Mapping[str, Any], config: Path | None, env: Mapping[str, str], script: Path | None = None,
    words: Sequence[str] = (),
) -> Choice | None:
    """Returns the engine that a command line leads to; None where the session may settle or refuse it by itself.

    Args:
        flags: plan fields given on the command line.
        config: what --config names.
        env: the environment.
        script: train.py, for a duel of the engines where the plan asks for one.
        words: the command line that a duel runs it with.
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
        spec, speeds = probe(plan.model), [*BUILT_IN, *known_speeds()]
        if plan.engine_duel and script is not None and undecided(spec, machine, mode=plan.mode, speeds=speeds):
            mode = "full" if plan.mode == "full" else "lora"
            speeds += race(script, words, spec, machine, mode, lambda text: print(text, file=sys.stderr, flush=True))
        return choose_engine(spec, machine, mode=plan.mode, unsloth_installed=installed, speeds=speeds)
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
