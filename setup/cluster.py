"""`./run.sh plan --as torchrun | slurm | skypilot`: the training of a plan as a script for a cluster's own manager.

Only the training: data is read, the plan made and checked here, now; the result is what `train.py` leaves, on which
`./run.sh resume RUN` goes on with merge, head, GGUF and evaluation.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import yaml

from sparktune.setup.machine.backends import program_root
from sparktune.setup.plan.config import SAID
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.plan.trainable import refuse_ranks
from sparktune.setup.replay import plan_arguments

__all__ = ["KINDS", "ClusterKind", "cluster_script", "for_cluster", "training_words"]

ClusterKind = Literal["torchrun", "slurm", "skypilot"]
KINDS: tuple[str, ...] = get_args(ClusterKind)

_OF_A_MACHINE = ("device", "dtype", "recompute", "recompute_layers", "engine")
"""Recommended for the machine that made the plan; the one that trains decides for itself unless somebody said so."""
_PORT = 29500
_RESTARTS = 3
_CPUS = 8
"""Cores a GPU: its rank, its loader, and what compiles kernels."""
_AWAY = "/home-over-there"
"""Stands for a home folder that only the machine itself can name."""


def training_words(plan: Plan) -> list[str]:
    """Returns train.py's arguments for a decided plan: what was said, and what followed from the data."""
    open_again = {
        field: Plan.model_fields[field].get_default() for field in _OF_A_MACHINE
        if plan.origins.get(field, "default") not in SAID
    }
    paths = {field: _absolute(getattr(plan, field)) for field in ("data", "eval_data", "results", "output")}
    local = {"model": os.path.abspath(plan.model)} if Path(plan.model).is_dir() else {}
    changed = plan.model_copy(update={**open_again, **paths, **local, "gpus": 1})
    return plan_arguments(changed, "train")


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _lines(words: list[str], indent: str) -> str:
    """Quotes arguments for a shell, a flag and its value on a line."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines or len(lines[-1]) == 2 or "=" in lines[-1][0]:
            lines.append([word])
        else:
            lines[-1].append(word)
    return f" \\\n{indent}".join(shlex.join(line) for line in lines)


_BODY = """\
# A run that was begun goes on from its newest checkpoint; the command is the same.
if [ -f {plan} ]; then
    words=(--resume-from-checkpoint {run})
else
    words=(
        {words}
    )
fi
"""


def _body(plan: Plan, name: str) -> str:
    run = plan.results.absolute() / name
    words = _lines([*training_words(plan), "--name", name], "        ").replace(" \\\n", "\n")
    return _BODY.format(plan=shlex.quote(str(run / "plan.yaml")), run=shlex.quote(str(run)), words=words)


def _torchrun(plan: Plan, name: str, nodes: int, spec: ModelSpec) -> str:
    script = shlex.quote(str(program_root() / "train.py"))
    if nodes == 1:
        where, usage = "--standalone", "# Start it on the machine that trains."
    else:
        where = f'--nnodes {nodes} --node-rank "$2" --master-addr "$1" --master-port {_PORT}'
        usage = (
            f"# Start it on each of the {nodes} machines: {name}.sh ADDRESS NUMBER. ADDRESS is the first machine's,\n"
            f"# on the link between them; NUMBER is 0 there and 1 to {nodes - 1} on the others. The program, the data\n"
            "# and the base model lie under the same paths on all of them; records and checkpoints on the first alone."
        )
    return (
        f"#!/usr/bin/env bash\n# Trains {spec.source}; written by ./run.sh plan --as torchrun.\n{usage}\n"
        f"set -euo pipefail\n{_body(plan, name)}"
        f"exec torchrun {where} --nproc-per-node {plan.gpus} --max-restarts {_RESTARTS} \\\n"
        f'    {script} "${{words[@]}}"\n'
    )


def _slurm(plan: Plan, name: str, nodes: int, spec: ModelSpec) -> str:
    script = shlex.quote(str(program_root() / "train.py"))
    return (
        f"#!/usr/bin/env bash\n# Trains {spec.source}; written by ./run.sh plan --as slurm. sbatch THIS_FILE\n"
        f"#SBATCH --job-name={name}\n#SBATCH --nodes={nodes}\n#SBATCH --ntasks-per-node=1\n"
        f"#SBATCH --gpus-per-node={plan.gpus}\n#SBATCH --cpus-per-task={_CPUS * plan.gpus}\n"
        f"#SBATCH --output={name}-%j.log\n#SBATCH --requeue\n"
        "# Before the time limit: the step in progress is finished, a checkpoint written. torch 2.11 and older give\n"
        "# that 30 seconds, later ones what the variable below says.\n"
        "#SBATCH --signal=TERM@300\n"
        f"set -euo pipefail\n{_body(plan, name)}"
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"\n'
        "# shellcheck disable=SC2016  # each machine's own number\n"
        "exec srun bash -c 'exec torchrun --node-rank \"$SLURM_NODEID\" \"$@\"' torchrun \\\n"
        f'    --nnodes "$SLURM_JOB_NUM_NODES" --master-addr "$head" --master-port {_PORT} \\\n'
        f"    --nproc-per-node {plan.gpus} --max-restarts {_RESTARTS} \\\n"
        f'    {script} "${{words[@]}}"\n'
    )


def _skypilot(plan: Plan, name: str, nodes: int, spec: ModelSpec) -> str:
    """SkyPilot copies the program and the data to machines of its own; records come back with `sky rsync`."""
    assert plan.data is not None, "a decided plan has data"
    mounts, moved = {}, {}
    for field, path in (("data", plan.data), ("eval_data", plan.eval_data)):
        if path is not None:
            there = f"sparktune-{field.replace('_', '-')}/{path.name}"  # a folder each: both may be called rows.jsonl
            mounts[f"~/{there}"] = str(path.absolute())
            moved[field] = Path(_AWAY) / there
    if Path(plan.model).is_dir():
        mounts["~/sparktune-model"] = os.path.abspath(plan.model)
    words = training_words(plan.model_copy(update={**moved, "results": Path("results"), "output": Path("output")}))
    here = {local: f"{_AWAY}/{there.removeprefix('~/')}" for there, local in mounts.items()}
    words = [here.get(word, word) for word in words]
    skipped = {"--results", "--output"}
    kept = [w for i, w in enumerate(words) if w not in skipped and (i == 0 or words[i - 1] not in skipped)]
    quoted = " ".join(
        f'"$HOME"{shlex.quote(w.removeprefix(_AWAY))}' if w.startswith(_AWAY) else shlex.quote(w)
        for w in [*kept, "--name", name]
    )
    run = (
        f'if [ -f results/{name}/plan.yaml ]; then words=(--resume-from-checkpoint results/{name}); else\n'
        f"words=({quoted}); fi\n"
        'torchrun --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" \\\n'
        f'  --nproc-per-node "$SKYPILOT_NUM_GPUS_PER_NODE" --max-restarts {_RESTARTS} \\\n'
        f'  --master-addr "$(head -n 1 <<< "$SKYPILOT_NODE_IPS")" --master-port {_PORT} \\\n'
        '  train.py "${words[@]}"\n'
    )
    task = {
        "name": name,
        "resources": {"accelerators": f"H200:{plan.gpus}"},
        "num_nodes": nodes,
        "workdir": str(program_root()),
        "file_mounts": mounts,
        "setup": "pip install '.[train]'\n",
        "run": run,
    }
    head = (
        f"# Trains {spec.source}; written by ./run.sh plan --as skypilot. sky launch -c {name} THIS_FILE\n"
        f"# Change accelerators to what you rent. Records: rsync -Pavz {name}:~/sky_workdir/results .\n"
    )
    return head + yaml.safe_dump(task, sort_keys=False, default_style=None, width=10_000)


_WRITERS: dict[str, Callable[[Plan, str, int, ModelSpec], str]] = {
    "torchrun": _torchrun, "slurm": _slurm, "skypilot": _skypilot,
}


def for_cluster(plan: Plan, nodes: int) -> Plan:
    """Returns the plan as all machines together will train it, before anything is recommended for it.

    Args:
        plan: as asked for; `gpus` of each machine.
        nodes: machines.

    Raises:
        PreflightError, UsageError: so many ranks cannot train this together.
    """
    refuse_ranks(plan, plan.gpus * nodes)
    return plan.model_copy(update={"ranks": plan.gpus * nodes})


def cluster_script(plan: Plan, spec: ModelSpec, kind: str, nodes: int) -> str:
    """Returns a script that trains `plan`; a run without a name gets one that no other script has.

    Args:
        plan: decided, for all machines together.
        spec: the model's.
        kind: one of KINDS.
        nodes: machines.
    """
    name = plan.name or f"{plan.mode}-{time.strftime('%Y-%m-%d-%H%M%S')}"
    return _WRITERS[kind](plan, name, nodes, spec)
