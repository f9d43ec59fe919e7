"""Times some steps of a plan on the user's own data, and from them the whole training: RUN/calibration.json.

    python train.py --config RUN/plan.yaml --rehearse 15

The plan is built exactly as training would build it, trains a few steps in a folder that is removed afterwards, and
what they learned is thrown away. It goes as a run goes: start, evaluation, samples, the first steps that make kernels
and graphs ready; then the steps that are timed, and evaluation, samples, checkpoint and export once more. What costs
more the first time is counted once, the rest as often as the run will do it.

What the machine keeps (compiled kernels, weights and libraries in the page cache) a run finds there because the
rehearsal has paid for it. So a rehearsal that had to compile or to read from the disk is done once more in a new
process (training/warmth.py), which is the one that counts. Otherwise the compiler's seconds would be announced once,
and paid by nobody.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparktune.setup.data.tokenise import prepare
from sparktune.setup.data.tokenizer import load_tokenizer
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import ExitCode, SparktuneError
from sparktune.setup.plan.eta import Calibration
from sparktune.setup.plan.events import EventKind
from sparktune.setup.plan.intervals import times
from sparktune.setup.plan.models import probe, resolve_model_dir
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.training.checkpoint import LoopState
from sparktune.training.dealing import StepCost
from sparktune.training.decisions import decide_plan, device_of, refuse_unsupported
from sparktune.training.gpu_lock import hold_gpu
from sparktune.training.loop import TrainingLoop
from sparktune.training.memory import peak_gib
from sparktune.training.narrator import Narrator
from sparktune.training.packing import PackPlan
from sparktune.training.session import assemble, examine_result, prepare_torch
from sparktune.training.stop import StopRequest
from sparktune.training.warmth import COLD, Warmth

__all__ = ["Cold", "rehearse", "run_rehearsal", "spread_of", "steps_seconds"]

_WARM_UP = 3
"""Steps that compile kernels and capture graphs; their excess over a later step counts once."""
_EVAL_BATCHES = 4
_LEAST_SPREAD = 0.03


class Cold(Exception):
    """This process paid for what the machine keeps; a new one will find it there."""


def _synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def steps_seconds(costs: Sequence[float], seconds: Sequence[float], all_costs: Sequence[float]) -> float:
    """Returns the seconds of steps whose arithmetic is known, from some that were timed.

    A straight line through what was timed, at the mean of all: steps have a part that does not grow with them (the
    launches, the optimiser), so the line is never steeper than through the origin, and never falls.

    Args:
        costs: FLOP of the timed steps.
        seconds: of the timed steps.
        all_costs: FLOP of the steps that are asked for.
    """
    cost, spent = statistics.mean(costs), statistics.mean(seconds)
    spread = sum((c - cost) ** 2 for c in costs)
    together = sum((c - cost) * (s - spent) for c, s in zip(costs, seconds, strict=True))
    slope = min(max(together / spread, 0.0), spent / cost) if spread > (0.02 * cost) ** 2 * len(costs) else spent / cost
    return len(all_costs) * (spent + slope * (statistics.mean(all_costs) - cost))


def spread_of(rates: Sequence[float]) -> float:
    """Returns two standard errors of the mean, as a share of it."""
    if len(rates) < 2:
        return 0.1
    return 2 * statistics.stdev(rates) / statistics.mean(rates) / math.sqrt(len(rates))


class _Rehearsal:
    """A loop at its beginning, and a clock."""

    def __init__(
        self, loop: TrainingLoop, cost: StepCost, stop: StopRequest, events: Narrator, finish: Callable[[], object]
    ) -> None:
        self.loop, self.cost, self.stop, self.events, self.finish = loop, cost, stop, events, finish
        self.device, self.total = loop.engine.device, loop.length.total_steps
        assert isinstance(loop.train, PackPlan)
        self.train = loop.train
        held_out = loop.evaluation
        self.held_out = held_out if isinstance(held_out, PackPlan) and len(held_out) else None
        self.seconds: list[float] = []
        self.costs: list[float] = []
        self.tokens: list[int] = []

    def _timed(self, work: Callable[[], object]) -> float:
        before = _synchronised(self.device)
        work()
        return _synchronised(self.device) - before

    def step(self, of: int) -> None:
        """Makes one step."""
        if self.stop.requested:
            raise KeyboardInterrupt
        seen, step = self.loop.state.tokens, self.loop.state.step + 1
        self.seconds.append(self._timed(self.loop.step))
        self.costs.append(self.cost(*self.train.work(*self.loop.length.where(step))))
        self.tokens.append(self.loop.state.tokens - seen)
        self.events.progress("calibrate", step, of, "steps")

    def evaluation(self) -> float:
        """Returns the seconds of one evaluation, from some of its micro-batches."""
        held_out = self.held_out
        if held_out is None:
            return 0.0
        few = min(_EVAL_BATCHES, len(held_out))

        def some() -> None:
            for index in range(few):
                self.loop.engine.loss_sum(held_out.micro_batch(0, index))

        whole = self.cost(*held_out.work(0, 0, len(held_out))) / self.cost(*held_out.work(0, 0, few))
        return self._timed(some) * whole

    def samples(self) -> tuple[float, float]:
        """Answers the prompts once. Returns (seconds, tokens of all answers)."""
        answers: list[list[int]] = []

        def answer() -> None:
            for prompt in self.loop.prompts:
                answers.append(self.loop.engine.generate(prompt.ids, self.loop.max_new_tokens, self.loop.stop_ids))

        return self._timed(answer), sum(map(len, answers))

    def save(self) -> float:
        """Writes a checkpoint."""
        return self._timed(self.loop.save)

    def export(self) -> float:
        """Writes the result, as at the end of training."""
        return self._timed(self.finish)

    def data_answers(self) -> float:
        """Returns the tokens of the prompts' answers if those are as long as the data's."""
        source = (self.held_out or self.train).dataset
        counts = source.supervised_counts
        longest = self.loop.max_new_tokens
        return len(self.loop.prompts) * float(counts.clip(max=longest).mean()) if len(counts) else 0.0

    def epoch_costs(self) -> list[float]:
        """Returns the FLOP of every step of the first epoch."""
        steps = range(1, min(self.total, self.loop.length.steps_per_epoch) + 1)
        return [self.cost(*self.train.work(*self.loop.length.where(step))) for step in steps]


def rehearse(
    loop: TrainingLoop, spec: ModelSpec, supervised_share: float, steps: int, start_s: float, stop: StopRequest,
    events: Narrator, finish: Callable[[], object], is_cold: Callable[[], bool] = lambda: False,
) -> Calibration:
    """Times `steps` steps of a loop at its beginning, and every other thing it will do.

    Args:
        loop: at step 0; it is worn out afterwards.
        spec: the model.
        supervised_share: share of the tokens that are learned.
        steps: how many to time, after the warm-up.
        start_s: seconds from the process's start until the loop was built.
        stop: a signal ends the rehearsal between two steps.
        events: hears how far it is.
        finish: what follows the last checkpoint: the export, and whatever is measured of it.
        is_cold: asked when everything was done once: whether this process paid for what the next will find.

    Raises:
        Cold: it did.
        SparktuneError: the run is too short to be timed.
        KeyboardInterrupt: a signal asked to stop.
    """
    plan_steps = loop.length.total_steps
    warm_up = min(_WARM_UP, max(plan_steps - 2, 0))
    timed = min(steps, plan_steps - warm_up)
    if timed < 2:
        raise SparktuneError(f"The run has {plan_steps} steps, too few to time some of them. Just start it.")
    at = _Rehearsal(loop, StepCost.of(loop.plan, spec, supervised_share), stop, events, finish)
    first_evaluation, (first_samples, _) = at.evaluation(), at.samples()
    for _ in range(warm_up):
        at.step(warm_up + timed)
    if is_cold():
        at.save()
        at.export()
        raise Cold
    for _ in range(timed):
        at.step(warm_up + timed)
    seconds, costs = at.seconds[warm_up:], at.costs[warm_up:]
    an_epoch = at.epoch_costs()
    steps_s = steps_seconds(costs, seconds, an_epoch) * plan_steps / len(an_epoch)
    first_s = max(0.0, sum(at.seconds[:warm_up]) - steps_seconds(costs, seconds, at.costs[:warm_up] or [0.0]))
    evaluation, (samples, tokens) = at.evaluation(), at.samples()
    evaluations = times(loop.eval_steps, plan_steps) if at.held_out else 0
    evaluation_s = evaluation * evaluations + max(first_evaluation, evaluation)
    # answers grow as long as the data's while the model learns: half of them as long as now, half as there
    each = samples / tokens if tokens else 0.0
    now, later = (each * count * times(loop.sample_steps, plan_steps) for count in (tokens, at.data_answers()))
    samples_s = first_samples + (now + later) / 2
    saves_s = at.save() * times(loop.save_steps, plan_steps)
    export_s = at.export()
    spread = spread_of([s / c for s, c in zip(seconds, costs, strict=True)])
    others_s = evaluation_s + samples_s + saves_s + export_s
    train_s = start_s + first_s + steps_s + others_s
    margin = (
        max(spread * steps_s, _LEAST_SPREAD * train_s) + 0.2 * (start_s + first_s + others_s) + abs(now - later) / 2
    )
    loop.say(
        f"{timed} steps took {statistics.mean(seconds):.2f} s each; start {start_s + first_s:.1f} s, "
        f"{evaluations + 1} evaluations {evaluation_s:.1f} s, samples {samples_s:.1f} s, checkpoints and result "
        f"{saves_s + export_s:.1f} s."
    )
    return Calibration(
        steps=timed, train_s=round(train_s, 2), low_s=round(max(0.0, train_s - margin), 2),
        high_s=round(train_s + margin, 2), tok_per_s=round(sum(at.tokens[warm_up:]) / sum(seconds), 1),
        peak_gib=round(peak_gib(at.device), 3), device=at.device.type,
        parts={
            "start": round(start_s, 2), "first steps": round(first_s, 2), "steps": round(steps_s, 2),
            "evaluation": round(evaluation_s, 2), "samples": round(samples_s, 2), "saves": round(saves_s, 2),
            "export": round(export_s, 2),
        },
    )


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


def _rehearse_plan(root: Path, steps: int, warmth: Warmth, events: Narrator) -> Calibration:
    plan = load_plan(root / "plan.yaml")
    spec, device = probe(plan.model), device_of(plan)
    refuse_unsupported(plan, spec, device)
    with hold_gpu(device, plan.name or "that is being started"):
        return _time_plan(root, plan, spec, device, steps, warmth, events)


def _time_plan(
    root: Path, plan: Plan, spec: ModelSpec, device: torch.device, steps: int, warmth: Warmth, events: Narrator
) -> Calibration:
    model_dir = resolve_model_dir(plan.model)
    tokenizer = load_tokenizer(str(model_dir))
    data = prepare(plan, spec, str(model_dir), events, tokenizer)
    plan = decide_plan(plan, spec, data, device, events)
    scratch = Path(tempfile.mkdtemp(prefix=".rehearsal-", dir=root))
    run = RunDir(name=scratch.name, results_root=root, output_root=root)
    stop = StopRequest()
    stop.install()
    try:
        prepare_torch(plan, device)
        loop = assemble(
            plan, spec, model_dir, run, data, tokenizer, device, events, stop, checkpoint=None,
            state=LoopState(maths={}),
        )
        start_s = warmth.since_start_s()

        def finish() -> None:
            loop.export()
            examine_result(loop, model_dir, events)

        try:
            return rehearse(
                loop, spec, data.report.supervised_share, steps, start_s, stop, events, finish, warmth.is_cold
            )
        finally:
            loop.log.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_rehearsal(config: Path, steps: int, warmth: Warmth) -> int:
    """Rehearses the plan in `config` and writes calibration.json beside it. Returns the exit code.

    A process that found the machine cold returns COLD and writes nothing: another one is to do it again.

    Args:
        config: a complete plan.yaml.
        steps: steps to time, at least 2.
        warmth: when the process started, and what the machine kept then.
    """
    root, events = config.resolve().parent, _Quiet()
    try:
        events.attach(root / "stages" / "calibrate.ndjson", None)
        result = _rehearse_plan(root, max(2, steps), warmth, events)
        write_durably(root / "calibration.json", result.model_dump_json(indent=1))
        return ExitCode.OK
    except Cold:
        events.message(f"The machine was cold ({warmth.why}): once more, as the run will find it.")
        return COLD
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
