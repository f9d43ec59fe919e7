"""The training loop: data order, accumulation, schedule, logs, evaluation, samples, early stopping, checkpoints.

It works for every engine (training/engine.py) and owns everything that is not the model. A step is
forward_backward over its micro-batches, one optimiser step, and one read of the loss: the only synchronisation.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.intervals import tenth
from sparktune.setup.plan.outfolder import put_in_place, size_of
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.training.batch import MicroBatch
from sparktune.training.checkpoint import (
    LoopState,
    rotate,
    save_checkpoint,
    storage_error,
    sync_tree,
    validate,
)
from sparktune.training.distributed import World
from sparktune.training.engine import Engine
from sparktune.training.health import HISTORY, BadStep, check_first_gradients, damaged_tensors, judge, some
from sparktune.training.heard import heard_state
from sparktune.training.memory import is_out_of_memory, peak_gib
from sparktune.training.metrics import MetricsLog, NoMetrics
from sparktune.training.recovery import pass_over, recompute_more
from sparktune.training.schedule import RunLength, learning_rate, warmup_length
from sparktune.training.stop import StopRequest
from sparktune.training.stopping import far_from_its_end, stop_here, tell_stop

__all__ = ["Batches", "SamplePrompt", "TrainingLoop"]

_STEPS_THAT_COMPILE = 2


class _GiveUp(Exception):
    """The step in progress is given up: the stop does not wait for its end."""


class Batches(Protocol):
    """Micro-batches in their order; the same epoch and index give the same micro-batch, always."""

    def __len__(self) -> int:
        """Micro-batches of one epoch."""

    def of_step(self, epoch: int, first: int, last: int) -> Iterator[MicroBatch]:
        """Yields what this rank trains of micro-batches first..last - 1, each built when it is asked for."""

    def micro_batch(self, epoch: int, index: int) -> MicroBatch:
        """Returns one micro-batch, on the CPU."""

    def supervised_tokens(self, epoch: int, first: int, last: int) -> int:
        """Returns the number of targets in micro-batches first..last - 1 of `epoch`, without building them."""

    def lines(self, micro_batch: MicroBatch) -> list[int]:
        """Returns the line numbers, in the data file, of a micro-batch's examples."""


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """A prompt that is answered during training."""

    text: str
    """For people."""
    ids: tuple[int, ...]
    """As the chat template renders it, generation prompt included."""


@dataclass(kw_only=True)
class TrainingLoop:
    """One training run. Every field is decided before the loop starts; `state` alone changes."""

    engine: Engine
    plan: Plan
    """Fully resolved: learning_rate and gradient_accumulation are numbers."""
    run: RunDir
    length: RunLength
    train: Batches
    evaluation: Batches | None
    """None where nothing is held out."""
    prompts: Sequence[SamplePrompt]
    decode: Callable[[Sequence[int]], str]
    stop_ids: Sequence[int]
    """Token ids that end an answer."""
    log: MetricsLog | NoMetrics
    state: LoopState
    stop: StopRequest
    say: Callable[[str], None]
    """Takes one sentence for the user."""
    show: Callable[[str], None]
    """Takes one line of a step's figures."""
    max_new_tokens: int = 64
    world: World = field(default_factory=World)
    """The ranks that train together. All do the same in the same order; rank 0 alone writes."""

    def __post_init__(self) -> None:
        total = self.length.total_steps
        self.save_steps = tenth(self.plan.save_steps, total)
        self.eval_steps = tenth(self.plan.eval_steps, total)
        self.sample_steps = self.plan.sample_steps or self.eval_steps
        self.warmup = warmup_length(total, self.plan.warmup_ratio, self.plan.warmup_steps)
        self.result_name = "weights" if self.plan.mode == "full" else "adapter"
        self.spent = {what: [0.0, 0.0] for what in ("evaluation", "samples", "saves")}
        """What the loop did besides its steps: [how much, seconds]; micro-batches, tokens, folders."""
        self.first_spent: dict[str, list[float]] = {}
        """The same of the first of each, which compiles kernels."""
        self._checked = False
        """The gradients of this process's first step have been looked at."""
        self._last_line_s = 0.0
        self._slowest_s: float | None = None
        """Of this process's steps, from the third on: the first ones compile."""
        self._steps_here = 0
        self._saved_step: int | None = self.state.step if self.state.step else None
        self._began_s = 0.0
        self.micro_batch_s = 0.0
        """Seconds of a micro-batch of the step before."""
        self.stop_told = False
        """What the stop will take has been said."""

    # -- the loop

    def run_to_end(self) -> Path:
        """Trains from `state.step` to the end and exports the result. Returns the result's folder.

        Raises:
            StoppedResumable: a signal asked to stop; a checkpoint was written.
            SparktuneError: a step must not be learned from, a gradient is missing, or the disk refused.
        """
        self.stop.looping = True
        if self.world.network:
            self.say(self.world.network)
        if self.state.step == 0 or self.state.pending:
            self._after_step()
        while self.state.step < self.length.total_steps and not self._out_of_patience():
            self.step()
            self._after_step()
        if self._out_of_patience() and self.state.step < self.length.total_steps:
            self.say(
                f"Early stopping: no lower evaluation loss for {self.state.evals_without_gain} evaluations; "
                f"the lowest was {self.state.best_eval_loss:.4f} at step {self.state.best_step}."
            )
        if self._saved_step != self.state.step:
            self.save()
        self.world.enter("the end of the run")
        self._take_best()
        if self.state.passed_over:
            self.say(f"Warning: {self.state.passed_over} steps were passed over; warnings above name their rows.")
        return self.export()

    def step(self) -> None:
        """One optimiser step over the micro-batches that belong to it.

        Raises:
            StoppedResumable: memory ran short meanwhile; the step is done again when the run goes on.
            SparktuneError: the step must not be learned from, and the plan says stop.
        """
        self._began_s = time.perf_counter()
        step = self.state.step + 1
        # spread weights are gathered inside the passes: who is late there may wait for another rank
        self.world.enter(f"step {step}", self._slowest_s, apart=self.plan.mode != "full")
        epoch, first, last = self.length.where(step)
        batches: list[MicroBatch] = []
        lr = learning_rate(
            step, peak=self._peak(), total_steps=self.length.total_steps, warmup=self.warmup,
            shape=self.plan.lr_scheduler,
        )
        loss, grad_norm, tokens, supervised = self._pass(epoch, first, last, batches)
        bad = self._judged(loss, grad_norm, batches)
        if bad is not None:
            pass_over(self, step, bad, batches)
        else:
            if not self._checked:
                self._checked = True
                check_first_gradients(self.engine, step, self.say, self.world)
            self.engine.optimiser_step(lr)
            assert loss is not None, "a step without a loss is bad"
            self.state.recent_losses = [*self.state.recent_losses, loss][-HISTORY:]
            self.state.bad_in_a_row = 0
        self.state.step = step
        self.state.position = self.length.position_after(step)
        self.state.tokens += tokens
        finite = loss is not None and math.isfinite(loss)
        took = time.perf_counter() - self._began_s
        self.micro_batch_s = took / max(1, len(batches))
        row = {
            "step": step, "epoch": round(self.length.epoch_after(step), 6), "loss": loss if finite else None, "lr": lr,
            "grad_norm": grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None, "tokens": tokens,
            "supervised_tokens": supervised,
            "tok_per_s": round(tokens / took, 1),
            "peak_gib": round(peak_gib(self.engine.device), 3),
        }
        if bad is not None:
            row["passed_over"] = bad.kind
        self._steps_here += 1
        if self._steps_here > _STEPS_THAT_COMPILE:
            self._slowest_s = max(self._slowest_s or 0.0, took)
        self.log.step(row, self.length.total_steps)
        self._print(row)

    def _pass(
        self, epoch: int, first: int, last: int, batches: list[MicroBatch]
    ) -> tuple[float | None, float | None, int, int]:
        """Computes a step's gradients; `batches` takes this rank's micro-batches.

        Returns (loss, gradient norm, tokens, supervised tokens) of all ranks together; twice None first where nothing
        is supervised.

        Reading the two numbers is the step's only wait for the device; the optimiser runs while the next step begins.
        """
        supervised = self.train.supervised_tokens(epoch, first, last)
        try:
            if not supervised:
                batches += self._drawn(epoch, first, last, [])
                return None, None, int(self.world.sums([sum(b.real_tokens for b in batches)])[0]), 0
            loss, norm = self._try_pass(epoch, first, last, batches, supervised)
        except _GiveUp:
            self.engine.drop_gradients()
            stop_here(self)
        loss, found, tokens = self.world.sums(
            [loss, sum(b.supervised_tokens for b in batches), sum(b.real_tokens for b in batches)]
        )
        assert int(found) == supervised, "the count the gradients were divided by"
        return loss, norm, int(tokens), supervised

    def _judged(self, loss: float | None, grad_norm: float | None, batches: list[MicroBatch]) -> BadStep | None:
        """Returns what is wrong with the step; the ranks agree, for each sees its own micro-batches alone."""
        real = [batch for batch in batches if batch.real_tokens]
        bad = judge(loss, grad_norm, real, self.state.recent_losses, self.plan.loss_spike)
        if self.world.any(bad is not None) and bad is None:
            bad = BadStep(kind="masked", what="Micro-batches of another rank have no supervised token")
        return bad

    def _try_pass(
        self, epoch: int, first: int, last: int, batches: list[MicroBatch], supervised: int
    ) -> tuple[float, float]:
        """As `_pass`; where memory runs out, once more under the next recompute policy, which gives the same loss."""
        for again in (False, True):
            try:
                loss = self.engine.forward_backward(self._drawn(epoch, first, last, batches), supervised)
                with self.world.waiting():  # NCCL's sums are waited for here, not where they are asked for
                    both: list[float] = torch.stack([loss.double(), self.engine.gradient_norm().double()]).tolist()
                return both[0], both[1]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if again or not is_out_of_memory(error) or not self.world.alone:
                    raise
                why = str(error).partition("\n")[0]
            batches.clear()  # out here the failed pass's frames are gone, and what they held
            recompute_more(self, why)
        raise AssertionError("the second try returns or raises")

    def _drawn(self, epoch: int, first: int, last: int, kept: list[MicroBatch]) -> Iterator[MicroBatch]:
        """Builds each micro-batch when the engine asks for it, while the device still works on the one before."""
        for number, batch in enumerate(self.train.of_step(epoch, first, last)):
            if self.stop.requested and self.world.alone:  # several ranks cannot leave a step at different places
                if self.stop.urgent or far_from_its_end(self, self._began_s, number, last - first - number):
                    raise _GiveUp
                tell_stop(self, finishing=self.state.step + 1)
            kept.append(batch)
            yield batch

    def _peak(self) -> float:
        assert self.plan.learning_rate is not None, "resolved before the loop"
        return self.plan.learning_rate

    def _print(self, row: dict[str, Any]) -> None:
        """Says where the run is: the first and last step, and at most one line every two seconds between them."""
        now = time.monotonic()
        if row["step"] not in (1, self.length.total_steps) and now - self._last_line_s < 2.0:
            return
        self._last_line_s = now
        loss = "no finite loss" if row["loss"] is None else f"loss {row['loss']:.4f}"
        self.show(
            f"step {row['step']}/{self.length.total_steps}  epoch {row['epoch']:.2f}  {loss}  lr {row['lr']:.2e}  "
            f"{row['tok_per_s']:,.0f} tok/s  peak {row['peak_gib']:.2f} GiB"
        )

    # -- after a step

    def _after_step(self) -> None:
        """Evaluates, samples, saves and stops where due; at step 0 it says where the run starts from."""
        step, total = self.state.step, self.length.total_steps
        ends = step == total
        self.world.enter(f"what follows step {step}")
        self.state.pending = False
        if self.stop.requested and not ends:
            tell_stop(self)
        due = self.evaluation is not None and (step % self.eval_steps == 0 or ends)
        improved = False
        if due:
            value = self.evaluate()
            if value is None:
                self.state.pending = True
                stop_here(self)
            improved = self._note_evaluation(value)
        if step % self.sample_steps == 0 or ends:
            self.sample()
        keep_best = improved and self.plan.early_stopping is not None and step > 0
        if step and (step % self.save_steps == 0 or ends or keep_best):
            self.save()
        if not ends and self.world.any(self.stop.requested):
            stop_here(self)

    def _note_time(self, what: str, how_much: float, began: float) -> None:
        took = time.perf_counter() - began
        self.first_spent.setdefault(what, [how_much, took])
        self.spent[what][0] += how_much
        self.spent[what][1] += took

    def evaluate(self) -> float | None:
        """Returns the mean cross-entropy over the held-out supervised tokens; None when a stop was asked for."""
        assert self.evaluation is not None
        began = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        supervised = 0
        count, ranks = len(self.evaluation), self.world.size
        for start in range(0, count, ranks):
            if self.world.any(self.stop.requested):
                return None
            # Spread weights are gathered by all ranks or by none: who has no batch left computes the last one again.
            index = min(start + self.world.rank, count - 1)
            batch = self.evaluation.micro_batch(0, index)
            found = self.engine.loss_sum(batch)
            if start + self.world.rank < count:
                supervised += batch.supervised_tokens
                total += found
        loss, targets = self.world.sums([total.item(), supervised])  # waits for the device
        self._note_time("evaluation", len(self.evaluation), began)
        return loss / targets if targets else math.nan

    def _note_evaluation(self, value: float) -> bool:
        """Logs an evaluation loss. Returns whether it is the lowest so far."""
        state = self.state
        if math.isnan(value):
            self.say("Evaluation found no supervised token in the held-out rows; give a larger --eval-split.")
            return False
        epoch = round(self.length.epoch_after(state.step), 6)
        self.log.evaluation({"step": state.step, "epoch": epoch, "eval_loss": value})
        self.say(f"step {state.step}: evaluation loss {value:.4f}")
        if state.best_eval_loss is None or value < state.best_eval_loss:
            state.best_eval_loss, state.best_step, state.evals_without_gain = value, state.step, 0
            return True
        state.evals_without_gain += 1
        return False

    def sample(self) -> None:
        """Answers the prompts."""
        for prompt in self.prompts:
            began = time.perf_counter()
            answer = self.engine.generate(prompt.ids, self.max_new_tokens, self.stop_ids)
            self._note_time("samples", len(answer), began)
            self.log.sample(self.state.step, prompt.text, self.decode(answer))

    def _out_of_patience(self) -> bool:
        limit = self.plan.early_stopping
        return limit is not None and self.state.evals_without_gain >= limit

    # -- keeping

    def still_good(self) -> str:
        """Returns which checkpoint a run that ends here has."""
        return f"checkpoint-{self._saved_step} is still good" if self._saved_step else "there is no checkpoint yet"

    def is_saved(self) -> bool:
        """Says whether there is a checkpoint of this step as it stands."""
        return self._saved_step == self.state.step and not self.state.pending

    def save(self) -> None:
        """Writes a checkpoint of this step, unless there is one."""
        if self.is_saved():
            return
        began = time.perf_counter()
        engine_state = self.engine.state()
        if damaged := self._damaged_anywhere(engine_state):
            tensors = "1 tensor holds" if len(damaged) == 1 else f"{len(damaged)} tensors hold"
            raise SparktuneError(
                f"After step {self.state.step} {tensors} NaN or infinity: {some(damaged)}. No checkpoint was made of "
                f"them; {self.still_good()}. Lower --learning-rate or try --dtype float32."
            )
        self.state.metrics_bytes, self.state.samples_bytes = self.log.sync()
        path = self.run.checkpoint(self.state.step)
        if self.world.leads:
            save_checkpoint(self.run.root, self.state, engine_state, self.engine.export, self.result_name)
            best = {self.state.best_step} if self.plan.early_stopping is not None and self.state.best_step else set()
            rotate(self.run.root, self.plan.keep_checkpoints, {step for step in best if step is not None})
        else:
            self.engine.export(None)
            self.engine.lend()
        self.world.meet()
        self._saved_step = self.state.step
        self._note_time("saves", 1, began)
        self.state.save_bytes_per_s = size_of(path) / (time.perf_counter() - began)
        self.world.advise(f"{path.name} is whole: python train.py --resume-from-checkpoint {path}")
        self.say(f"step {self.state.step}: saved {path.name}")

    def _damaged_anywhere(self, engine_state: Mapping[str, torch.Tensor]) -> list[str]:
        """Returns the names of damaged tensors, each once: several ranks may hold it whole, or rows of it."""
        here = set(damaged_tensors(engine_state))  # names come in the same order on every rank
        bad = self.world.largest(torch.tensor([name in here for name in engine_state], dtype=torch.uint8)).tolist()
        return [name for name, is_bad in zip(engine_state, bad, strict=True) if is_bad]

    def _take_best(self) -> None:
        """With early stopping, the result is the evaluation that was best, not the last one."""
        best = self.state.best_step
        if self.plan.early_stopping is None or not best or best == self.state.step:
            return
        checkpoint = self.run.checkpoint(best)
        if not self.world.any(self.world.leads and checkpoint.is_dir()):
            self.say(
                f"Warning: {checkpoint}, which had the lowest evaluation loss, is gone; the result is step "
                f"{self.state.step} instead."
            )
            return
        if self.world.leads:
            validate(checkpoint)
        self.engine.load_state(heard_state(self.world, checkpoint))
        self.say(f"The result is step {best}, which had the lowest evaluation loss.")

    def export(self) -> Path:
        """Writes `adapter/` or `weights/` and returns it; the folder appears by rename."""
        final = self.run.root / self.result_name
        if not self.world.leads:
            self.engine.export(None)
            return final
        partial = self.run.root / f".{self.result_name}.partial"
        old = self.run.root / f".{self.result_name}.old"
        began = time.perf_counter()
        try:
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            self.engine.export(partial)
            sync_tree(partial)
            put_in_place(partial, final, old)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise storage_error(error, f"the trained {self.result_name} in {self.run.root}") from error
        self._note_time("saves", 1, began)
        return final
