"""Times some steps of a plan on the user's own data, and from them the whole training: RUN/calibration.json.

    python train.py --config RUN/plan.yaml --rehearse 15

The plan is built exactly as training would build it, trains a few steps in a folder that is removed afterwards, and
what they learned is thrown away. A step's time is shared out over its arithmetic (tokens, and attention's pairs of
tokens), so that steps of unequal size count for what they are; evaluation, samples and checkpoints are timed once each.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.tokenizer import load_tokenizer
from sparktune.setup.plan.arithmetic import training_flop
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import ExitCode, SparktuneError
from sparktune.setup.plan.eta import Calibration
from sparktune.setup.plan.events import EventKind
from sparktune.setup.plan.models import probe, resolve_model_dir
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.training.checkpoint import LoopState
from sparktune.training.loop import TrainingLoop
from sparktune.training.memory import peak_gib
from sparktune.training.narrator import Narrator
from sparktune.training.packing import PackPlan
from sparktune.training.session import assemble, decide_plan, device_of, prepare_torch, refuse_unsupported
from sparktune.training.stop import StopRequest

__all__ = ["StepCost", "rehearse", "run_rehearsal"]

_WARM_UP = 3
"""Steps that compile kernels and capture graphs; their excess over a later step counts once."""
_EVAL_BATCHES = 4
_LEAST_SPREAD = 0.03


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The arithmetic of a step, as a linear function of its tokens and of the sum of its documents' squared lengths."""

    a_token: float
    a_square: float

    @classmethod
    def of(cls, plan: Plan, spec: ModelSpec, supervised_share: float) -> StepCost:
        """Returns the cost of a model's steps."""
        zero, one = (training_flop(plan, spec, document=d, supervised_share=supervised_share) for d in (0.0, 1.0))
        return cls(a_token=zero, a_square=one - zero)

    def __call__(self, tokens: int, squares: int) -> float:
        """Returns the FLOP of a step."""
        return self.a_token * tokens + self.a_square * squares


def _synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rehearse(
    loop: TrainingLoop, spec: ModelSpec, supervised_share: float, steps: int, began: float, stop: StopRequest,
    events: Narrator,
) -> Calibration:
    """Times `steps` steps of a loop at its beginning, and every other thing it will do.

    Args:
        loop: at step 0; it is worn out afterwards.
        spec: the model.
        supervised_share: share of the tokens that are learned.
        steps: how many to time, after the warm-up.
        began: `time.perf_counter()` when the process began to build the loop.
        stop: a signal ends the rehearsal between two steps.
        events: hears how far it is.

    Raises:
        SparktuneError: the run is too short to be timed.
        KeyboardInterrupt: a signal asked to stop.
    """
    device, length = loop.engine.device, loop.length
    assert isinstance(loop.train, PackPlan)
    plan_steps = length.total_steps
    warm_up = min(_WARM_UP, max(plan_steps - 2, 0))
    timed = min(steps, plan_steps - warm_up)
    if timed < 2:
        raise SparktuneError(f"The run has {plan_steps} steps, too few to time some of them. Just start it.")
    cost = StepCost.of(loop.plan, spec, supervised_share)
    start_s = _synchronised(device) - began
    seconds, costs, tokens = [], [], 0
    for step in range(1, warm_up + timed + 1):
        if stop.requested:
            raise KeyboardInterrupt
        before, seen = _synchronised(device), loop.state.tokens
        loop.step()
        seconds.append(_synchronised(device) - before)
        costs.append(cost(*loop.train.work(*length.where(step))))
        tokens += (loop.state.tokens - seen) if step > warm_up else 0
        events.progress("calibrate", step, warm_up + timed, "steps")
    rate = sum(seconds[warm_up:]) / sum(costs[warm_up:])
    first_s = max(0.0, sum(seconds[:warm_up]) - rate * sum(costs[:warm_up]))
    first_epoch = range(1, min(plan_steps, length.steps_per_epoch) + 1)
    an_epoch = [cost(*loop.train.work(*length.where(step))) for step in first_epoch]
    steps_s = rate * sum(an_epoch) * plan_steps / len(an_epoch)
    others_s, held_out = _others(loop, cost)
    spread = _spread([s / c for s, c in zip(seconds[warm_up:], costs[warm_up:], strict=True)])
    train_s = start_s + first_s + steps_s + others_s
    margin = max(spread * steps_s, _LEAST_SPREAD * train_s) + 0.3 * (start_s + first_s + others_s)
    loop.say(
        f"{timed} steps took {statistics.mean(seconds[warm_up:]):.2f} s each; start {start_s + first_s:.1f} s, "
        f"{held_out} evaluation micro-batches, samples and checkpoints {others_s:.1f} s in all."
    )
    return Calibration(
        steps=timed, train_s=round(train_s, 2), low_s=round(max(0.0, train_s - margin), 2),
        high_s=round(train_s + margin, 2), tok_per_s=round(tokens / sum(seconds[warm_up:]), 1),
        peak_gib=round(peak_gib(device), 3), device=device.type,
    )


def _spread(rates: Sequence[float]) -> float:
    """Two standard errors of the mean, as a share of it."""
    if len(rates) < 2:
        return 0.1
    return 2 * statistics.stdev(rates) / statistics.mean(rates) / math.sqrt(len(rates))


def _others(loop: TrainingLoop, cost: StepCost) -> tuple[float, int]:
    """Seconds that evaluations, samples, checkpoints and the export will take over the run, from one of each."""
    device, total = loop.engine.device, loop.length.total_steps
    times_evaluated = total // loop.eval_steps + (total % loop.eval_steps > 0) + 1
    seconds, batches = 0.0, 0
    if isinstance(loop.evaluation, PackPlan) and len(loop.evaluation):
        batches = len(loop.evaluation)
        few = min(_EVAL_BATCHES, batches)
        before = _synchronised(device)
        for index in range(few):
            loop.engine.loss_sum(loop.evaluation.micro_batch(0, index))
        spent = _synchronised(device) - before
        share = cost(*loop.evaluation.work(0, 0, batches)) / cost(*loop.evaluation.work(0, 0, few))
        seconds += spent * share * times_evaluated
    before = _synchronised(device)
    loop.sample()
    times_sampled = total // loop.sample_steps + (total % loop.sample_steps > 0) + 1
    seconds += (_synchronised(device) - before) * times_sampled
    before = _synchronised(device)
    loop.save()
    times_saved = total // loop.save_steps + (total % loop.save_steps > 0) + 1  # the export writes about as much
    return seconds + (_synchronised(device) - before) * times_saved, batches


class _Quiet(Narrator):
    """Says what was decided and how far the rehearsal is, and nothing of the steps, which are not the run's."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = "calibrate"

    def emit(self, kind: EventKind, **fields: Any) -> None:
        """Writes one event unless it is a step's."""
        if kind not in ("metric", "sample", "artifact") and fields.get("phase") != "train":
            super().emit(kind, **fields)

    def line(self, text: str) -> None:
        """Prints a line that is no step's."""
        if not text.startswith("step "):
            super().line(text)


def _rehearse_plan(root: Path, steps: int, began: float, events: Narrator) -> Calibration:
    plan = load_plan(root / "plan.yaml")
    spec, device = probe(plan.model), device_of(plan)
    refuse_unsupported(plan, spec, device)
    model_dir = resolve_model_dir(plan.model)
    tokenizer = load_tokenizer(str(model_dir))
    data = prepare(plan, spec, str(model_dir), events, tokenizer)
    plan = decide_plan(plan, spec, data, device, events)
    scratch = Path(tempfile.mkdtemp(prefix=".rehearsal-", dir=root))
    stop = StopRequest()
    stop.install()
    try:
        prepare_torch(plan, device)
        loop = assemble(
            plan.model_copy(update={"tensorboard": False}), spec, model_dir,
            RunDir(name=scratch.name, results_root=root, output_root=root), data, tokenizer, device, events, stop,
            checkpoint=None, state=LoopState(maths={}),
        )
        try:
            return rehearse(loop, spec, data.report.supervised_share, steps, began, stop, events)
        finally:
            loop.log.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_rehearsal(config: Path, steps: int) -> int:
    """Rehearses the plan in `config` and writes calibration.json beside it. Returns the exit code.

    Args:
        config: a complete plan.yaml.
        steps: steps to time, at least 2.
    """
    began = time.perf_counter() - time.process_time()  # what was imported counts: training imports it too
    root, events = config.resolve().parent, _Quiet()
    try:
        events.attach(root / "stages" / "calibrate.ndjson", None)
        result = _rehearse_plan(root, max(2, steps), began, events)
        write_durably(root / "calibration.json", result.model_dump_json(indent=1))
        return ExitCode.OK
    except SparktuneError as error:
        return _refuse(events, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _refuse(events, "Stopped as you asked; nothing was timed.", ExitCode.INTERRUPTED)
    except (torch.OutOfMemoryError, MemoryError) as error:
        text = f"Out of memory while timing the plan: {error}. Lower --pack-length, or pass --recompute layer."
        return _refuse(events, text, ExitCode.MEMORY)
    finally:
        events.close()


def _refuse(events: Narrator, text: str, code: ExitCode) -> int:
    events.message(text, "error")
    print(text, file=sys.stderr)
    return code
