"""How long a plan will take and what it would cost elsewhere, before it starts: a range for every stage. Pure.

Training is arithmetic over a rate (setup/plan/speeds.py); a rehearsal of some steps on the user's own data
(training/rehearsal.py) replaces both. The other stages move bytes: at the pace this machine has shown, or a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from sparktune.setup.plan.arithmetic import forward_flop, training_flop
from sparktune.setup.plan.basestorage import base_storage
from sparktune.setup.plan.intervals import times
from sparktune.setup.plan.recommend import planned_steps
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan
from sparktune.setup.plan.speeds import Rate, Speed, chip_of, rate_for

__all__ = [
    "Calibration", "Eta", "Pace", "StageTime", "chips_of", "duration", "estimate", "filled_share",
    "micro_batch_tokens", "rented", "training_work", "work_of",
]

_SHARED = 0.3
"""What sums, gathers and waiting for each other may add to the longest time. Two H200s: 2 to 18 % (docs/scale.md)."""
_ERR_HIGH = 1.10
"""What is not calibrated is announced this much longer than the rate says: early is a pleasure, late is not."""
_TOKENS_PER_S = 40.0
"""Greedy decoding without a graph; a guess on the safe side."""
_EAGER_S_A_LAYER = 3.85e-3
"""Of a pass, forward and backward, that no graph replays: the host launches it kernel by kernel, however few tokens it
has. Measured on the host of an H200: 1,500 unpacked passes of 24 layers in 138.8 s (docs/results/eta.csv)."""
_DISK = 4e8
_MTP_RATE = 1.3
"""Of the training rate: with it, 2B on a GB10 gives the published 8,000 tok/s at 40 % supervised."""
_START_S = 25.0
_LINK = 2.5e7
_GGUF_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
_OTHER_BITS = 5.5

# Published arithmetic, prices of May 2026: an H100 with Unsloth is said to do 1.5 to 2 times a DGX Spark's work, and is
# priced at the same wall-clock time; an A100 does half.
_RENTED = (("H100 80GB", 1.0, 2.0, 2.49, 2.49), ("A100 40GB", 0.5, 0.5, 1.10, 1.29))


class Calibration(BaseModel):
    """What a rehearsal of some steps measured: RUN/calibration.json."""

    model_config = ConfigDict(extra="forbid")

    steps: int
    """Steps that were timed."""
    train_s: float
    """The whole stage, from its start to the exported result."""
    low_s: float
    high_s: float
    tok_per_s: float
    """Real tokens a second of the timed steps."""
    peak_gib: float
    device: str
    parts: dict[str, float] = Field(default_factory=dict)
    """What `train_s` consists of, in seconds."""


class Pace(BaseModel):
    """How fast this machine went through a stage: seconds = fixed + work / pace."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    chip: str
    work: float
    """Bytes (merge, gguf), FLOP (mtp), weights (evaluate): see `work_of`; `training_work` for the parts of training."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """One stage's time, in seconds."""

    stage: str
    seconds: float
    low: float
    high: float
    reason: str
    parts: Mapping[str, float] = field(default_factory=dict)
    """What training's seconds consist of, before the margin; empty for the other stages."""


@dataclass(frozen=True, kw_only=True)
class Eta:
    """A run's time, in seconds."""

    stages: tuple[StageTime, ...]
    unknown: str = ""
    """Why training itself could not be estimated; empty where it could."""

    @property
    def seconds(self) -> float:
        """The likely time."""
        return sum(s.seconds for s in self.stages)

    @property
    def low(self) -> float:
        """The least."""
        return sum(s.low for s in self.stages)

    @property
    def high(self) -> float:
        """The most."""
        return sum(s.high for s in self.stages)

    def stage(self, name: str) -> StageTime | None:
        """Returns one stage's time."""
        return next((s for s in self.stages if s.stage == name), None)


def duration(seconds: float) -> str:
    """Returns a time as a person says it: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest} min" if rest and hours < 12 else f"{round(minutes / 60)} h"
    days, rest = divmod(round(minutes / 60), 24)
    return f"{days} d {rest} h"


def work_of(stage: str, plan: Plan, spec: ModelSpec, report: DatasetReport) -> float:
    """Returns the amount of work of a stage, in the unit that its pace is kept in."""
    weights = spec.parameters * 2.0
    if stage == "merge":
        return weights
    if stage == "gguf":
        return sum(weights * (1 + _GGUF_BITS.get(kind, _OTHER_BITS) / 16) for kind in plan.gguf)
    if stage == "mtp":
        return _mtp_flop(spec, report) if plan.mtp == "trained" else weights
    if stage == "evaluate":
        return float(spec.parameters)
    return 1.0


def _mtp_flop(spec: ModelSpec, report: DatasetReport) -> float:
    """One epoch of the head: the base forward, and one layer and the vocabulary forward and backward."""
    tokens = report.lengths.total
    layer = spec.parameters / max(spec.num_layers, 1)
    head = 2.0 * spec.hidden_size * spec.vocab_size * report.supervised_share
    return tokens * (forward_flop(spec, document=report.lengths.mean, head_share=0.0) + 6.0 * layer + 3.0 * head)


def _guess(stage: str, seconds: float, reason: str, low: float = 0.4, high: float = 2.5) -> StageTime:
    return StageTime(stage=stage, seconds=seconds, low=seconds * low, high=seconds * high, reason=reason)


def training_work(
    plan: Plan, spec: ModelSpec, report: DatasetReport, steps: int, save_bytes: float
) -> dict[str, float]:
    """Returns how much a training of `steps` does besides its steps.

    Args:
        plan: complete.
        spec: the model.
        report: the data.
        steps: optimiser steps.
        save_bytes: of one checkpoint.

    Returns:
        "train: start" (bytes that are loaded), "train: evaluation" (FLOP), "train: samples" (tokens), "train: saves"
        (bytes): the names under which their paces are kept.
    """
    document = report.lengths.mean
    held_out = report.eval_examples * document * forward_flop(
        spec, document=document, head_share=report.supervised_share
    )
    asked = len(plan.sample_prompts) if plan.sample_prompts else min(3, report.eval_examples)
    answer = min(64.0, document * report.supervised_share)
    pauses = {name: times(given, steps) for name, given in (
        ("evaluation", plan.eval_steps), ("samples", plan.sample_steps or plan.eval_steps), ("saves", plan.save_steps),
    )}
    return {
        "train: start": spec.parameters * 2.0,
        "train: evaluation": held_out * (pauses["evaluation"] + 1),
        "train: samples": asked * answer * (pauses["samples"] + 1),
        "train: saves": save_bytes * (pauses["saves"] + 1),  # and the result
    }


def _besides(work: Mapping[str, float], paces: Sequence[Pace], chip: str, rate: Rate) -> dict[str, float]:
    """Seconds of each of training's works besides its steps, as this machine has shown them, or as is guessed."""
    seconds = {}
    guesses = {
        "train: start": _START_S + work["train: start"] / _DISK,
        "train: evaluation": work["train: evaluation"] / rate.flop_per_s,
        "train: samples": work["train: samples"] / _TOKENS_PER_S,
        "train: saves": work["train: saves"] / _DISK,
    }
    for name, guess in guesses.items():
        own = [p for p in paces if p.stage == name and p.chip == chip and p.work > 0]
        if not own or not work[name]:
            seconds[name] = guess
        elif name == "train: start":
            # Most of it does not grow with the weights; the newest, for a machine's first runs compiled kernels.
            nearest = min(abs(math.log(p.work / work[name])) for p in own)
            seconds[name] = [p.seconds for p in own if abs(math.log(p.work / work[name])) <= nearest + 1e-9][-1]
        else:
            recent = own[-5:]
            seconds[name] = work[name] * sum(p.seconds for p in recent) / sum(p.work for p in recent)
    return seconds


def _train(
    plan: Plan, spec: ModelSpec, report: DatasetReport, rate: Rate, save_bytes: float, paces: Sequence[Pace], chip: str
) -> StageTime:
    flop = training_flop(plan, spec, document=report.lengths.mean, supervised_share=report.supervised_share)
    steps = planned_steps(plan, report)
    tokens = report.lengths.total * _epochs(plan, report, steps) / filled_share(plan, report)
    chips = chips_of(plan)
    steps_s = tokens * flop / rate.flop_per_s / chips
    reason = rate.reason
    launching = _launch_s(plan, spec, report, steps) if not rate.same_shape else 0.0
    if launching > steps_s:
        steps_s = launching
        reason += "; passes this small wait for the host to launch them"
    besides = _besides(training_work(plan, spec, report, steps, save_bytes), paces, chip, rate)
    rest = sum(besides.values())
    known = any(p.stage == "train: start" and p.chip == chip for p in paces)
    least, most = (0.7, 1.4) if known else (0.3, 2.0)
    low, high = steps_s / rate.high + least * rest, steps_s / rate.low + most * rest
    if chips > 1:
        high += _SHARED * steps_s / rate.low
        reason += f"; {chips} chips share a step, each taken to be as fast as one alone"
    parts = {"steps": steps_s, **{name.removeprefix("train: "): seconds for name, seconds in besides.items()}}
    return StageTime(
        stage="train", seconds=(steps_s + rest) * _ERR_HIGH, low=low, high=high, reason=reason, parts=parts
    )


def _launch_s(plan: Plan, spec: ModelSpec, report: DatasetReport, steps: int) -> float:
    """Returns the seconds that a GPU's host needs for the passes of `steps`; 0 where graphs replay them."""
    graphs = (
        plan.pack and not plan.lora_dropout and base_storage(plan) == "none"
        and not (plan.mode == "full" and plan.processes > 1)
    )
    if plan.device != "cuda" or plan.engine == "unsloth" or graphs:
        return 0.0
    passes = steps * (plan.gradient_accumulation or 1) / plan.processes
    return passes * spec.num_layers * _EAGER_S_A_LAYER


def chips_of(plan: Plan) -> int:
    """Returns how many chips of the machine's kind share a step: GPUs, or machines where CPUs train."""
    return plan.processes if plan.device != "cpu" else 1 + len(plan.peers)


def _epochs(plan: Plan, report: DatasetReport, steps: int) -> float:
    if plan.max_steps is None:
        return plan.num_epochs
    an_epoch = planned_steps(plan.model_copy(update={"max_steps": None, "num_epochs": 1.0}), report)
    return steps / an_epoch


def filled_share(plan: Plan, report: DatasetReport) -> float:
    """Share of real tokens in what a GPU computes: padded packs. A CPU pads nothing."""
    if plan.device != "cuda" or not plan.pack or not plan.pack_length:
        return 1.0
    return max(_fill(plan.pack_length, report), 0.05)


def micro_batch_tokens(plan: Plan, report: DatasetReport) -> float:
    """Returns the real tokens of a micro-batch."""
    if not plan.pack or not plan.pack_length:
        return plan.per_device_batch_size * report.lengths.mean
    return plan.per_device_batch_size * max(plan.pack_length * _fill(plan.pack_length, report), report.lengths.mean)


def _fill(pack_length: int, report: DatasetReport) -> float:
    """Share of real tokens in packs of the nearest length that the data's report knows."""
    return report.packing[min(report.packing, key=lambda n: abs(n - pack_length))] if report.packing else 1.0


def _moved(stage: str, work: float, paces: Sequence[Pace], chip: str, guess: StageTime) -> StageTime:
    """A stage whose time this machine has shown before, or the guess."""
    own = [p for p in paces if p.stage == stage and p.chip == chip and p.work > 0][-5:]
    if not own:
        return guess
    near = min(own, key=lambda p: abs(math.log(p.work / work)) if work > 0 else 0.0)
    # a stage has a fixed cost (starting Python, importing torch): less work never scales below half of what was seen
    seconds = near.seconds * max(0.5, work / near.work)
    far = work / near.work
    wide = 1.3 if 0.5 <= far <= 2 else 2.0
    return StageTime(stage=stage, seconds=seconds * 1.05, low=seconds / wide, high=seconds * wide,
                     reason="this machine's last runs")


def estimate(
    plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine, *, stages: Sequence[str],
    book: Sequence[Speed] = (), paces: Sequence[Pace] = (), calibration: Calibration | None = None,
    download_bytes: float = 0.0, save_bytes: float = 0.0,
) -> Eta:
    """Returns what is known of the run's time.

    Args:
        plan: complete.
        spec: the model.
        report: the data.
        machine: where it will run.
        stages: the stages that are still to run.
        book: speeds of this machine's own runs, newest last.
        paces: its other stages' times, newest last.
        calibration: a rehearsal's result for this very plan.
        download_bytes: weights that are not on this machine yet.
        save_bytes: of one checkpoint.
    """
    chip, times, unknown = chip_of(machine), [], ""
    if download_bytes:
        times.append(_guess("download", download_bytes / _LINK, f"{download_bytes / 1e9:.1f} GB at 25 MB/s, a guess"))
    rate = rate_for(
        plan, spec, machine, book, document=report.lengths.mean, micro_tokens=micro_batch_tokens(plan, report)
    )
    guesses: Mapping[str, StageTime] = {
        "prepare": _guess("prepare", 5.0, "the tokens are cached"),
        "merge": _guess("merge", 15 + spec.parameters * 4 / _DISK, "a guess: read and write every weight"),
        "gguf": _guess("gguf", 15 + work_of("gguf", plan, spec, report) / 1.5e8, "a guess: 150 MB/s a type"),
        "evaluate": _guess("evaluate", 60 + spec.parameters / 2e7, "a guess"),
        "report": _guess("report", 5.0, "a guess"),
        "mtp": _guess("mtp", 20 + spec.parameters * 4 / _DISK, "a guess: copy the base's head"),
    }
    for stage in stages:
        if stage == "train":
            if calibration is not None:
                times.append(StageTime(
                    stage="train", seconds=calibration.train_s, low=calibration.low_s, high=calibration.high_s,
                    reason=f"{calibration.steps} steps of this plan, timed on this machine", parts=calibration.parts,
                ))
            elif rate is None:
                unknown = f"no speed is known for {chip}"
            else:
                times.append(_train(plan, spec, report, rate, save_bytes, paces, chip))
            continue
        guess = guesses[stage]
        if stage == "mtp" and plan.mtp == "trained" and rate is not None:
            seconds = 60 + _mtp_flop(spec, report) / (_MTP_RATE * rate.flop_per_s) * _ERR_HIGH
            guess = _guess("mtp", seconds, "one epoch of the head, from the training rate", 0.4, 1.8)
        times.append(_moved(stage, work_of(stage, plan, spec, report), paces, chip, guess))
    return Eta(stages=tuple(times), unknown=unknown)


def rented(plan: Plan, spec: ModelSpec, report: DatasetReport) -> list[tuple[str, float, float, float, float]]:
    """Returns what the same training would take on rented GPUs with Unsloth: (GPU, hours low, high, $ low, high).

    As the published comparison reckons: a DGX Spark's published time, divided by the factor between the chips, times
    the price an hour of May 2026.
    """
    spark = Machine(device="cuda", gpu_name="NVIDIA GB10", memory_gib=110, cpu_cores=20, disk_free_gib=1000)
    theirs = plan.model_copy(update={"engine": "unsloth", "device": "cuda", "recompute": "auto"})
    rate = rate_for(theirs, spec, spark)
    assert rate is not None, "the published figures are built in"
    flop = training_flop(theirs, spec, document=report.lengths.mean, supervised_share=report.supervised_share)
    epochs = _epochs(plan, report, planned_steps(plan, report))
    hours = report.lengths.total * epochs * flop / rate.flop_per_s / 3600
    return [
        (name, hours / fast, hours / slow, hours / fast * cheap, hours / slow * dear)
        for name, slow, fast, cheap, dear in _RENTED
    ]
