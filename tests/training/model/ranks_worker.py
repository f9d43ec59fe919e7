"""Trains tiny models in worlds of several gloo processes; started by test_ranks.py as a program of its own.

    python ranks_worker.py SPEC.json

Modules are imported once and every rank is forked from here, so a world costs no start-up. The spec names cases
(model folder, mode, type), sizes of worlds and a work folder; what comes out lies in WORK/CASE-WORLD/ as a run leaves
it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparktune.kernels.select import reference_ops
from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.events import NullEvents
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.training import checkpoint as cp
from sparktune.training.checkpoint import LoopState
from sparktune.training.dealing import DealtPacks, StepCost
from sparktune.training.distributed import Members, World
from sparktune.training.heard import heard_resume_point, heard_state
from sparktune.training.loop import TrainingLoop
from sparktune.training.metrics import MetricsLog, NoMetrics
from sparktune.training.native_engine import NativeEngine
from sparktune.training.packing import PackPlan
from sparktune.training.schedule import run_length
from sparktune.training.stop import StopRequest

STEPS, SAVED = 4, 2
LENGTHS = [30, 5, 17, 3, 22, 9, 40, 12, 6, 28, 4, 19, 33, 8]
"""Of the documents: uneven packs, and with 48 tokens a pack more of them than steps of three have room for."""
MUTE = (3,)
"""A document in which nothing is learned; it shares a pack. (A pack without a supervised token is a bad step.)"""


def dataset(lengths: list[int] = LENGTHS) -> TokenDataset:
    random = np.random.default_rng(5)
    ids = np.concatenate([random.integers(0, 97, n) for n in lengths]).astype(np.uint32)
    supervised = [np.zeros(n, np.uint8) if i in MUTE else (random.random(n) < 0.6).astype(np.uint8)
                  for i, n in enumerate(lengths)]
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return TokenDataset(ids, np.concatenate(supervised), offsets, np.arange(1, len(lengths) + 1), key="ranks")


def train(case: dict[str, Any], work: Path, name: str, world: World, resume: Path | None = None) -> None:
    """One run of `case` in `world`, from its beginning or from a checkpoint."""
    root = work / name
    if world.leads:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        if resume is not None:
            shutil.copytree(resume, root / resume.name)
    world.meet()
    plan = Plan(
        mode=case["mode"], dtype=case["dtype"], data=Path("none.jsonl"), model=case["model"], pack_length=48,
        gradient_accumulation=3, learning_rate=1e-3, lora_r=4, lora_alpha=8.0, lora_dropout=case["dropout"],
        recompute=case["recompute"], save_steps=1, keep_checkpoints=STEPS, eval_steps=STEPS, max_steps=STEPS, seed=3,
    )
    spec = probe(case["model"])
    engine = NativeEngine.build(
        plan, spec, Path(case["model"]), torch.device("cpu"), ops=reference_ops(), world=world
    )
    packs = PackPlan(dataset(), pack=True, pack_length=48, seed=3)
    shared = packs if world.alone else DealtPacks(
        packs, rank=world.rank, ranks=world.size, cost=StepCost.of(plan, spec, 0.6), fill=plan.mode == "full"
    )
    run = RunDir(name=name, results_root=work, output_root=work)
    found = (cp.newest_valid(run.root, print), LoopState()) if world.leads else None
    if found is not None and found[0] is not None:
        found = (found[0], cp.load_loop_state(found[0]))
    checkpoint, state = heard_resume_point(world, found)
    if checkpoint is not None:
        engine.load_state(heard_state(world, checkpoint))
        if world.leads:  # what every rank has taken, gathered again: the test compares it with the file
            cp.write_safetensors(root / "taken.safetensors", engine.state())
        else:
            engine.lend()
    state.metrics_bytes = state.samples_bytes = 0
    TrainingLoop(
        engine=engine, plan=plan, run=run, length=run_length(len(packs), 3, 9.0, STEPS), train=shared,
        evaluation=PackPlan(dataset(LENGTHS[:5]), pack=False, pack_length=None, shuffle=False), prompts=[], decode=str,
        stop_ids=(), state=state, stop=StopRequest(), say=lambda text: None, show=lambda text: None, world=world,
        log=MetricsLog(run, state, NullEvents(), tensorboard=False, say=print) if world.leads else NoMetrics(),
    ).run_to_end()


def rank_main(rank: int, size: int, port: int, spec: dict[str, Any], resumes: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"})
    world = World(members=Members(rank=rank, size=size, local_rank=rank, local_size=size, port=port),
                  tell=lambda text, aloud: print(text, file=sys.stderr, flush=True))
    world.join()
    work = Path(spec["work"])
    for case in spec["cases"]:
        if not resumes:
            train(case, work, f"{case['name']}-{size}", world)
        elif case["resumed"]:
            most = f"{case['name']}-{max(spec['worlds'])}"
            train(case, work, f"{most}to{size}", world, work / most / f"checkpoint-{SAVED}")
    world.leave()


def run_world(size: int, spec: dict[str, Any], *, resumes: bool = False) -> None:
    """Forks `size` ranks and waits for them; raises if one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            try:
                rank_main(rank, size, port, spec, resumes)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(f"ranks of a world of {size} ended with {codes}")


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    if any(case["mode"] == "full" for case in given["cases"]):
        import_module("sparktune.training.sharding")  # seconds, once and not in every rank
    for ranks in given["worlds"]:
        run_world(ranks, given)
    for ranks in given["resumed_on"]:
        run_world(ranks, given, resumes=True)
