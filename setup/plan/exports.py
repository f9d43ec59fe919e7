"""What can be exported here: asked when a run is planned, so that nobody trains for hours towards a refusal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.models import is_hub_id
from sparktune.setup.plan.rundir import RunDir, cache_dir
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.plan.weights import safetensors_header, safetensors_index

__all__ = [
    "BYTES_PER_WEIGHT", "CONVERTER_TYPES", "GGUF_TYPES", "baseline_run", "check_evaluation",
    "check_exports", "check_gguf_types", "needs_quantiser", "written_types",
]

CONVERTER_TYPES = ("bf16", "f16", "f32", "q8_0")
"""GGUF types that llama.cpp's converter writes without compiled code."""
# Bits a weight of the block matrices, upper bounds of llama.cpp's mixtures (they give some tensors a larger type).
_QUANTISER_BITS = {
    "q1_0": 2.2, "q2_0": 2.6, "q4_0": 4.7, "q4_1": 5.2, "q5_0": 5.7, "q5_1": 6.2, "mxfp4_moe": 8.6,
    "iq1_s": 2.3, "iq1_m": 2.5, "iq2_xxs": 2.7, "iq2_xs": 2.9, "iq2_s": 3.1, "iq2_m": 3.3, "iq3_xxs": 3.6,
    "iq3_xs": 3.8, "iq3_s": 3.9, "iq3_m": 4.1, "iq4_nl": 4.9, "iq4_xs": 4.7, "tq1_0": 2.3, "tq2_0": 2.6,
    "q2_k": 3.6, "q2_k_s": 3.4, "q3_k": 4.3, "q3_k_s": 3.9, "q3_k_m": 4.3, "q3_k_l": 4.7, "q4_k": 5.2, "q4_k_s": 4.9,
    "q4_k_m": 5.2, "q5_k": 5.9, "q5_k_s": 5.7, "q5_k_m": 5.9, "q6_k": 6.7,
}
BYTES_PER_WEIGHT = {"bf16": 2.0, "f16": 2.0, "f32": 4.0, "q8_0": 34 / 32} | {
    kind: bits / 8 for kind, bits in _QUANTISER_BITS.items()
}
"""GGUF type -> bytes a weight: exact for the converter's types, an upper bound for the quantiser's."""
GGUF_TYPES = tuple(BYTES_PER_WEIGHT)
"""Every type that the pinned llama.cpp writes."""


def needs_quantiser(kind: str) -> bool:
    """Returns whether a type is made by llama.cpp's compiled quantiser."""
    return kind not in CONVERTER_TYPES


def written_types(types: Sequence[str]) -> list[str]:
    """Returns the types that lie on the disk at once: those asked for, and what the quantiser reads."""
    between = any(map(needs_quantiser, types)) and not {"bf16", "f32"} & {*types}
    return [*types, *(["bf16"] if between else [])]


def check_gguf_types(types: Sequence[str]) -> None:
    """Checks the GGUF types asked for.

    Raises:
        UsageError: a type is unknown, or is given twice.
    """
    unknown = [t for t in types if t not in GGUF_TYPES]
    if unknown:
        raise UsageError(f"--gguf takes {', '.join(GGUF_TYPES)}, or none; got {unknown[0]!r}.")
    if len(set(types)) != len(types):
        raise UsageError(f"--gguf should name each type once; got {','.join(types)}.")


def _check_compiler(types: Sequence[str]) -> None:
    """Refuses types that need compiled programs where there are none and none can be made."""
    compiled = [t for t in types if needs_quantiser(t)]
    names = [os.environ["CXX"].split(" ")[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    built = any(cache_dir("llama.cpp").glob("tools-*/build.json"))
    if compiled and not built and not any(shutil.which(name) for name in names):
        raise PreflightError(
            f"--gguf {','.join(compiled)} needs llama.cpp's quantiser, which is compiled once on this machine, and "
            f"there is no C++ compiler ({', '.join(names)}). Install one: sudo apt-get install g++. Or ask for types "
            f"that need none: {', '.join(CONVERTER_TYPES)}."
        )


def _check_head(plan: Plan, spec: ModelSpec | None) -> None:
    """Refuses a --mtp-head that cannot be this model's; a head on the hub is looked at when it is fetched."""
    given = plan.mtp_head
    if given is None or plan.mtp == "skip":
        return
    path, fc = Path(given).expanduser(), "mtp.fc.weight"
    if path.is_dir():
        index = safetensors_index(path)
        entry = safetensors_header(index[fc]).get(fc) if fc in index else None
    elif path.is_file():
        entry = safetensors_header(path).get(fc)
    elif is_hub_id(given):
        return
    else:
        raise UsageError(f"--mtp-head {given} should be a safetensors file, a model's folder or a hub id such as "
                         "Qwen/Qwen3.5-2B; there is no such file or folder.")
    if entry is None:
        raise UsageError(f"--mtp-head {given} holds no {fc}: it has no MTP head. Give the published checkpoint, or a "
                         "file made by mtp/extract_upstream_mtp.py.")
    if spec is not None and entry.shape[0] != spec.hidden_size:
        raise UsageError(f"--mtp-head {given} belongs to a model of another size: its {fc} has {entry.shape[0]:,} "
                         f"rows, this model's hidden size is {spec.hidden_size:,}.")


def baseline_run(baseline: str, results_root: Path) -> RunDir:
    """Returns the run that --baseline names.

    Args:
        baseline: a run's name, or its folder.
        results_root: where the runs are.

    Raises:
        UsageError: there is none, or it has no merged model.
    """
    for root in (results_root / baseline, Path(baseline)):
        if (root / "plan.yaml").is_file():
            found = RunDir.from_root(root, load_plan(root / "plan.yaml").output)
            if not (found.merged / "config.json").is_file():
                raise UsageError(f"--baseline {baseline}: {found.merged} holds no merged model. Finish that run "
                                 f"first: ./run.sh resume {found.name}")
            return found
    raise UsageError(f"--baseline {baseline} should name a run; {results_root / baseline} has no plan.yaml. ./run.sh "
                     "runs lists them.")


def check_evaluation(plan: Plan, results_root: Path) -> None:
    """Refuses an evaluation against a run that is not there, or by a judge that is no program here.

    With --backend docker the judge may be a program of the image: there, the stage finds out.

    Args:
        plan: what is asked for.
        results_root: where the runs are.

    Raises:
        UsageError: says what is missing.
    """
    if plan.baseline is not None:
        baseline_run(plan.baseline, results_root)
    if plan.validator and plan.backend != "docker" and shutil.which(plan.validator[0]) is None:
        raise UsageError(f"--validator {plan.validator[0]!r} is no program here. Give its path, with its arguments "
                         "after it; a program of the image alone needs --backend docker.")


def check_exports(plan: Plan, spec: ModelSpec | None = None) -> None:
    """Refuses a plan that asks for what cannot be exported or evaluated here.

    Args:
        plan: what is asked for.
        spec: the base, where it is known; a given MTP head is held against it.

    Raises:
        UsageError: says what is missing and what there is instead.
        PreflightError: a type needs a compiler, and there is none. In a container the image brings the programs.
    """
    check_gguf_types(plan.gguf)
    _check_head(plan, spec)
    check_evaluation(plan, plan.results)
    if plan.backend == "local":
        _check_compiler(plan.gguf)
