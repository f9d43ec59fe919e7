"""`./run.sh plan --as torchrun | slurm | skypilot`: the training of a plan as a script for a cluster's own manager.

Only the training: data is read, the plan made and checked here, now; the result is what `train.py` leaves, on which
`./run.sh resume RUN` goes on with merge, head, GGUF and evaluation.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import yaml

from sparktune.setup.machine.backends import program_root
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.replay import plan_arguments

__all__ = ["KINDS", "ClusterKind", "cluster_script", "training_words"]

ClusterKind = Literal["torchrun", "slurm", "skypilot"]
KINDS: tuple[str, ...] = get_args(ClusterKind)

_OF_A_MACHINE = ("device", "dtype", "recompute", "recompute_layers", "engine")
"""Recommended for the machine that made the plan; the one that trains decides for itself unless somebody said so."""
_SAID = ("flag", "environment", "config", "saved")
_PORT = 29500
_RESTARTS = 3


def training_words(plan: Plan) -> list[str]:
    """Returns train.py's arguments for a decided plan: what was said, and what followed from the data."""
    open_again = {
        field: Plan.model_fields[field].get_default() for field in _OF_A_MACHINE
        if plan.origins.get(field, "default") not in _SAID
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
        where = f'--nnodes {nodes} --rdzv-backend c10d --rdzv-id {shlex.quote(name)} --rdzv-endpoint "$1:{_PORT}"'
        usage = (
            f"# Start it on each of the {nodes} machines with the first one's address: {name}.sh ADDRESS\n"
            "# The program, the data and the base model lie under the same paths on all of them; records and\n"
            "# checkpoints on the first alone. Several interfaces: export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
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
        f"#SBATCH --gpus-per-node={plan.gpus}\n#SBATCH --output={name}-%j.log\n#SBATCH --requeue\n"
        "# Before the time limit: the step in progress is finished, a checkpoint written.\n"
        "#SBATCH --signal=TERM@300\n"
        f"set -euo pipefail\n{_body(plan, name)}"
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240\n'
        'exec srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" \\\n'
        f'    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:{_PORT}" \\\n'
        f"    --nproc-per-node {plan.gpus} --max-restarts {_RESTARTS} \\\n"
        f'    {script} "${{words[@]}}"\n'
    )


def _skypilot(plan: Plan, name: str, nodes: int, spec: ModelSpec) -> str:
    """SkyPilot copies the program and the data to machines of its own; records come back with `sky rsync`."""
    assert plan.data is not None, "a decided plan has data"
    mounts = {"~/sparktune-data/" + plan.data.name: str(plan.data.absolute())}
    moved = plan.model_copy(update={"data": Path("/root/sparktune-data") / plan.data.name})
    if plan.eval_data is not None:
        mounts["~/sparktune-data/" + plan.eval_data.name] = str(plan.eval_data.absolute())
        moved = moved.model_copy(update={"eval_data": Path("/root/sparktune-data") / plan.eval_data.name})
    if Path(plan.model).is_dir():
        mounts["~/sparktune-base"] = os.path.abspath(plan.model)
    words = training_words(moved.model_copy(update={"results": Path("results"), "output": Path("output")}))
    words = ["$HOME/" + w.removeprefix("/root/") if w.startswith("/root/sparktune-data") else w for w in words]
    if Path(plan.model).is_dir():
        words = ["$HOME/sparktune-base" if w == os.path.abspath(plan.model) else w for w in words]
    skipped = {"--results", "--output"}
    kept = [w for i, w in enumerate(words) if w not in skipped and (i == 0 or words[i - 1] not in skipped)]
    quoted = " ".join(f'"{w}"' if w.startswith("$HOME/") else shlex.quote(w) for w in [*kept, "--name", name])
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


def cluster_script(plan: Plan, spec: ModelSpec, kind: str, nodes: int) -> str:
    """Returns a script that trains `plan`.

    Args:
        plan: decided; `gpus` of each machine.
        spec: the model's.
        kind: one of KINDS.
        nodes: machines.
    """
    name = plan.name or f"{plan.mode}-{spec.source.rstrip('/').rpartition('/')[2].lower()}"
    return _WRITERS[kind](plan, name, nodes, spec)
