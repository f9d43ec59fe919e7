"""The loop on a toy engine: what is logged, when it stops, what it keeps, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from sparktune.setup.plan.errors import ExitCode, SparktuneError, StoppedResumable
from sparktune.setup.plan.events import EventWriter, NullEvents
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.training import checkpoint as cp
from sparktune.training.batch import MicroBatch
from sparktune.training.checkpoint import LoopState
from sparktune.training.loop import SamplePrompt, TrainingLoop
from sparktune.training.metrics import MetricsLog
from sparktune.training.optimiser import MasterAdamW
from sparktune.training.schedule import run_length
from sparktune.training.stop import StopRequest

VOCAB = 11


class ToyEngine:
    """Predicts the next token from the current one: one matrix, and one more that nothing uses if asked."""

    device = torch.device("cpu")

    def __init__(self, unused: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator))
        named = [("table", self.weight)]
        if unused:
            named.append(("nobody.lora_A.weight", torch.nn.Parameter(torch.ones(2, 2))))
        self.optimiser = MasterAdamW(named, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)

    def forward_backward(self, micro_batches: Iterable[MicroBatch], n_supervised: int) -> torch.Tensor:
        total = torch.zeros(())
        for batch in micro_batches:
            loss = self._sum(batch) / n_supervised
            loss.backward()
            total += loss.detach()
        return total

    def _sum(self, batch: MicroBatch) -> torch.Tensor:
        logits = self.weight[batch.ids[batch.supervised_rows]]
        return F.cross_entropy(logits, batch.targets, reduction="sum")

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        return self.optimiser.named_gradients()

    def gradient_norm(self) -> torch.Tensor:
        return self.optimiser.norm()

    def optimiser_step(self, learning_rate: float) -> torch.Tensor:
        return self.optimiser.step(learning_rate)

    def drop_gradients(self) -> None:
        self.optimiser.drop_gradients()

    def recompute_more(self) -> str | None:
        return None

    @torch.no_grad()
    def loss_sum(self, micro_batch: MicroBatch) -> torch.Tensor:
        return self._sum(micro_batch)

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        return [int(self.weight[prompt_ids[-1]].argmax())]

    def state(self) -> dict[str, torch.Tensor]:
        return self.optimiser.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.optimiser.load_state(state)

    def export(self, folder: Path) -> None:
        folder.mkdir()
        save_file({"table": self.weight.detach()}, folder / "adapter_model.safetensors")


class ToyBatches:
    """One document a micro-batch; the order of an epoch follows from its number."""

    def __init__(self, documents: list[list[int]], supervised_from: int = 0) -> None:
        self.documents = documents
        self.supervised_from = supervised_from

    def __len__(self) -> int:
        return len(self.documents)

    def of_step(self, epoch: int, first: int, last: int) -> Iterator[MicroBatch]:
        return (self.micro_batch(epoch, index) for index in range(first, last))

    def micro_batch(self, epoch: int, index: int) -> MicroBatch:
        example = (index + epoch) % len(self.documents)
        ids = torch.tensor(self.documents[example])
        rows = torch.arange(min(self.supervised_from, len(ids) - 1), len(ids) - 1)
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        return MicroBatch(
            ids=ids, position_ids=torch.arange(len(ids)), cu_seqlens=bounds, cu_seqlens_cpu=bounds,
            max_seqlen=len(ids), supervised_rows=rows, targets=ids[rows + 1], examples=(example,), real_tokens=len(ids),
        )

    def supervised_tokens(self, epoch: int, first: int, last: int) -> int:
        return sum(self.micro_batch(epoch, index).supervised_tokens for index in range(first, last))

    def lines(self, micro_batch: MicroBatch) -> list[int]:
        return [example + 1 for example in micro_batch.examples]


DOCUMENTS = [[1, 2, 3, 4], [5, 6, 7], [1, 2, 8, 9, 10], [3, 4, 5], [2, 3, 4, 5, 6]]


def make_loop(
    root: Path, *, engine: ToyEngine | None = None, train: ToyBatches | None = None, held_out: bool = True,
    events: EventWriter | None = None, say: Callable[[str], None] = lambda text: None, state: LoopState | None = None,
    **values: Any,
) -> TrainingLoop:
    plan = Plan(**{
        "mode": "lora", "num_epochs": 4.0, "gradient_accumulation": 2, "learning_rate": 0.05, "save_steps": 5,
        "eval_steps": 3, "data": Path("rows.jsonl"), **values,
    })
    run = RunDir(name="toy", results_root=root, output_root=root)
    run.root.mkdir(exist_ok=True)
    train = train or ToyBatches(DOCUMENTS)
    state = state or LoopState()
    return TrainingLoop(
        engine=engine or ToyEngine(), plan=plan, run=run,
        length=run_length(len(train), plan.gradient_accumulation or 1, plan.num_epochs, plan.max_steps),
        train=train, evaluation=ToyBatches([[1, 2, 3], [4, 5, 6]]) if held_out else None,
        prompts=[SamplePrompt(text="after 1", ids=(1,))], decode=str, stop_ids=(),
        log=MetricsLog(run, state, events or NullEvents(), tensorboard=plan.tensorboard and held_out, say=say),
        state=state, stop=StopRequest(), say=say, show=say,
    )


def rows(root: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "toy" / name).read_text().splitlines()]


def test_a_run_leaves_what_the_contract_names(tmp_path: Path) -> None:
    events = EventWriter(tmp_path / "train.ndjson", "train")
    result = make_loop(tmp_path, events=events).run_to_end()
    assert result == tmp_path / "toy" / "adapter"
    steps = [r for r in rows(tmp_path) if "loss" in r]
    evals = [r for r in rows(tmp_path) if "eval_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert set(steps[0]) == {
        "step", "epoch", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "tok_per_s", "peak_gib",
    }
    assert [r["step"] for r in evals] == [0, 3, 6, 9, 12]
    assert evals[-1]["eval_loss"] < evals[0]["eval_loss"] - 0.3
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [r["epoch"] for r in steps[:4]] == [0.4, 0.8, 1.0, 1.4]
    assert sum(r["tokens"] for r in steps) == 4 * sum(map(len, DOCUMENTS))
    assert [r["step"] for r in rows(tmp_path, "samples.jsonl")] == [0, 3, 6, 9, 12]
    assert [p.name for p in cp.checkpoints_of(tmp_path / "toy")] == ["checkpoint-12", "checkpoint-10"]
    assert list((tmp_path / "toy" / "tensorboard").glob("events.*"))
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "train.ndjson").read_text().splitlines()]
    assert kinds.count("metric") == 17
    assert kinds.count("sample") == 5


def test_the_loss_of_a_step_is_the_mean_over_its_supervised_tokens(tmp_path: Path) -> None:
    engine = ToyEngine()
    table = engine.weight.detach().clone()
    make_loop(tmp_path, engine=engine, held_out=False, max_steps=1).run_to_end()
    pairs = [(a, b) for doc in DOCUMENTS[:2] for a, b in itertools.pairwise(doc)]
    expected = sum(-F.log_softmax(table[a], -1)[b].item() for a, b in pairs) / len(pairs)
    assert rows(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert rows(tmp_path)[0]["supervised_tokens"] == len(pairs)


def test_a_step_without_supervised_tokens_learns_nothing_and_says_so(tmp_path: Path) -> None:
    engine = ToyEngine()
    before = engine.weight.detach().clone()
    said: list[str] = []
    make_loop(
        tmp_path, engine=engine, train=ToyBatches(DOCUMENTS, supervised_from=99), held_out=False, say=said.append,
        on_bad_step="skip", num_epochs=3.0,
    ).run_to_end()
    assert torch.equal(engine.weight, before)
    assert {(r["loss"], r["supervised_tokens"]) for r in rows(tmp_path)} == {(None, 0)}
    assert "No token of the step is supervised at step 1. It comes from lines 1, 2 of rows.jsonl" in said[0]


def test_a_trainable_tensor_that_nothing_uses_is_named(tmp_path: Path) -> None:
    with pytest.raises(SparktuneError, match=r"1 trainable tensors got no gradient.*nobody\.lora_A\.weight"):
        make_loop(tmp_path, engine=ToyEngine(unused=True)).run_to_end()


def test_gradients_that_are_not_finite_at_the_first_step_are_named(tmp_path: Path) -> None:
    engine = ToyEngine()
    engine.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(SparktuneError, match=r"1 of 1 gradients are NaN or infinite: table"):
        make_loop(tmp_path, engine=engine).run_to_end()


class Damaged(ToyEngine):
    """A row of its weights is lost once `after` steps are learned."""

    def __init__(self, after: int, by: float) -> None:
        super().__init__()
        self.after, self.by, self.steps = after, by, 0

    def optimiser_step(self, learning_rate: float) -> torch.Tensor:
        norm = super().optimiser_step(learning_rate)
        self.steps += 1
        if self.steps == self.after:
            with torch.no_grad():
                self.weight[2] = self.by
        return norm


def test_a_loss_that_explodes_stops_the_run_and_names_step_and_lines(tmp_path: Path) -> None:
    with pytest.raises(SparktuneError) as caught:
        make_loop(tmp_path, engine=Damaged(after=6, by=math.nan), held_out=False).run_to_end()
    text = str(caught.value)
    assert "The loss is nan at step 7" in text
    assert "checkpoint-5 is still good" in text
    assert "lines 3, 4 of rows.jsonl" in text
    assert caught.value.exit_code == ExitCode.FAILURE
    assert not (tmp_path / "toy" / "adapter").exists()


def test_early_stopping_gives_the_best_evaluation_back(tmp_path: Path) -> None:
    class Worsening(ToyEngine):
        """Gets better for six steps, then worse."""

        steps = 0

        def optimiser_step(self, learning_rate: float) -> torch.Tensor:
            self.steps += 1
            return super().optimiser_step(learning_rate if self.steps <= 6 else -learning_rate)

    said: list[str] = []
    engine = Worsening()
    make_loop(tmp_path, engine=engine, say=said.append, num_epochs=20.0, early_stopping=2, save_steps=4,
              keep_checkpoints=1, lr_scheduler="constant").run_to_end()
    evals = {r["step"]: r["eval_loss"] for r in rows(tmp_path) if "eval_loss" in r}
    assert max(evals) == 12
    assert min(evals, key=evals.__getitem__) == 6
    assert any("Early stopping" in text for text in said)
    result = load_file(tmp_path / "toy" / "adapter" / "adapter_model.safetensors")["table"]
    assert torch.equal(result, cp.load_engine_state(tmp_path / "toy" / "checkpoint-6")["master.table"])
    assert [p.name for p in cp.checkpoints_of(tmp_path / "toy")] == ["checkpoint-12", "checkpoint-6"]


def without_clock(root: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("tok_per_s", "peak_gib")} for r in rows(root)]


@pytest.mark.parametrize("stop_at", ["step 1/12", "step 7/12", "step 12/12", "step 6: eval", "step 0: eval"])
def test_a_stop_asked_for_at_any_moment_resumes_to_the_same_end(tmp_path: Path, stop_at: str) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    make_loop(tmp_path / "whole").run_to_end()

    def say(text: str) -> None:
        if text.startswith(stop_at):
            first.stop.requested = True

    class Every(EventWriter):
        """Says every step: the loop itself says one line in two seconds."""

        def progress(self, phase: str, done: int, total: int | None, unit: str) -> None:
            say(f"step {done}/{total}")

    first = make_loop(tmp_path / "parts", say=say, events=Every(tmp_path / "train.ndjson", "train"))
    with pytest.raises(StoppedResumable, match=r"Go on with: python train\.py --") as caught:
        first.run_to_end()
    assert caught.value.exit_code == ExitCode.STOPPED
    newest = cp.newest_valid(tmp_path / "parts" / "toy", print)
    assert (newest is None) == stop_at.startswith("step 0")
    engine, state = ToyEngine(), LoopState()
    if newest is not None:
        engine.load_state(cp.load_engine_state(newest))
        state = cp.load_loop_state(newest)
    make_loop(tmp_path / "parts", engine=engine, state=state).run_to_end()
    assert without_clock(tmp_path / "parts") == without_clock(tmp_path / "whole")
    whole, parts = (tmp_path / name / "toy" / "adapter" / "adapter_model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_stop_inside_an_evaluation_does_the_evaluation_again(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)

    class Interrupting(ToyBatches):
        def micro_batch(self, epoch: int, index: int) -> MicroBatch:
            loop.stop.requested = loop.state.step == 6
            return super().micro_batch(epoch, index)

    loop.evaluation = Interrupting([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(StoppedResumable):
        loop.run_to_end()
    newest = tmp_path / "toy" / "checkpoint-6"
    state = cp.load_loop_state(newest)
    assert state.pending
    assert [r["step"] for r in rows(tmp_path) if "eval_loss" in r] == [0, 3]
    engine = ToyEngine()
    engine.load_state(cp.load_engine_state(newest))
    make_loop(tmp_path, engine=engine, state=state).run_to_end()
    assert [r["step"] for r in rows(tmp_path) if "eval_loss" in r] == [0, 3, 6, 9, 12]


def test_a_log_that_was_cut_by_somebody_is_told_not_hidden(tmp_path: Path) -> None:
    said: list[str] = []
    make_loop(tmp_path, say=said.append, held_out=False, state=LoopState(metrics_bytes=100))
    assert any("has 0 bytes, the checkpoint knew 100" in text for text in said)


def test_low_precision_weights_follow_float32_masters() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimiser = MasterAdamW([("w", weight)], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_grad_norm=0.0)
    for _ in range(100):
        (weight.float().sum() * 0.5).backward()
        (weight.float().sum() * 0.5).backward()
        gradient = dict(optimiser.named_gradients())["w"]
        assert gradient is not None
        assert gradient.dtype == torch.float32
        optimiser.step(1e-5)
    # Each single step is below half of bfloat16's spacing at 1, so weights without masters would never have moved.
    assert optimiser.masters()["w"].mean().item() == pytest.approx(1 - 1e-3, rel=1e-4)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, optimiser.masters()["w"].bfloat16())


def test_a_state_that_does_not_fit_names_the_entries() -> None:
    engine = ToyEngine()
    state = engine.state()
    state["extra"] = torch.zeros(1)
    state["master.table"] = torch.zeros(2, 2)
    del state["exp_avg.table"]
    with pytest.raises(ValueError, match=r"exp_avg\.table is missing; extra is unexpected; master\.table is \[2, 2\]"):
        engine.load_state(state)


# -- steps that must not be learned from, and steps that cannot be computed


class _Spoil(torch.autograd.Function):
    """The loss as it is, its gradient infinite."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.inf


class Poisoned(ToyEngine):
    """A token 9 spoils the loss, or the gradient, or makes a loss of a hundred, once `after` steps are learned."""

    def __init__(self, how: str = "loss", after: int = 0) -> None:
        super().__init__()
        self.how, self.after, self.steps = how, after, 0

    def _sum(self, batch: MicroBatch) -> torch.Tensor:
        loss = super()._sum(batch)
        if not (batch.ids == 9).any() or self.steps < self.after:
            return loss
        return {"loss": loss * math.nan, "gradient": _Spoil.apply(loss), "spike": loss + 100.0}[self.how]

    def optimiser_step(self, learning_rate: float) -> torch.Tensor:
        self.steps += 1
        return super().optimiser_step(learning_rate)


def resumed(root: Path, engine: ToyEngine, **values: Any) -> TrainingLoop:
    newest = cp.newest_valid(root / "toy", print)
    assert newest is not None
    engine.load_state(cp.load_engine_state(newest))
    return make_loop(root, engine=engine, state=cp.load_loop_state(newest), held_out=False, **values)


@pytest.mark.parametrize(("how", "what"), [
    ("loss", "The loss is nan at step 2. It comes from line 3 of rows.jsonl."),
    ("gradient", "The gradient norm is nan at step 2. 1 of 1 gradients are NaN or infinite: table. "
                 "It comes from line 3 of rows.jsonl."),
])
def test_a_row_that_spoils_a_step_is_named_and_nothing_is_learned_from_it(tmp_path: Path, how: str, what: str) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    said: list[str] = []
    make_loop(tmp_path / "whole", engine=Poisoned(how), held_out=False, say=said.append, on_bad_step="skip"
              ).run_to_end()
    assert any(what in text and "The step was skipped" in text for text in said)
    assert "4 steps were passed over" in said[-1]
    bad = [r["step"] for r in rows(tmp_path / "whole") if r.get("passed_over") == how]
    assert bad == [2, 4, 7, 12]  # line 3 comes once an epoch, wherever the epoch's order puts it

    with pytest.raises(SparktuneError) as caught:
        make_loop(tmp_path / "parts", engine=Poisoned(how), held_out=False).run_to_end()
    assert what in str(caught.value)
    assert "checkpoint-1 holds the step before" in str(caught.value)
    assert "--on-bad-step skip" in str(caught.value)
    assert caught.value.exit_code == ExitCode.FAILURE
    resumed(tmp_path / "parts", Poisoned(how), on_bad_step="skip").run_to_end()
    assert without_clock(tmp_path / "parts") == without_clock(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / n / "toy" / "adapter" / "adapter_model.safetensors") for n in
                    ("whole", "parts"))
    assert torch.equal(whole["table"], parts["table"])
    assert whole["table"].isfinite().all()


def test_a_spike_is_measured_against_the_last_steps(tmp_path: Path) -> None:
    with pytest.raises(SparktuneError, match=r"The loss jumped to \d+\.\d+, from a median of .* It comes from line 3"):
        make_loop(tmp_path, engine=Poisoned("spike", after=20), held_out=False, num_epochs=10.0).run_to_end()
    steps = [r["step"] for r in rows(tmp_path)]
    assert cp.checkpoints_of(tmp_path / "toy")[0].name == f"checkpoint-{steps[-1]}"
    engine = Poisoned("spike")
    resumed(tmp_path, engine, num_epochs=10.0, loss_spike=0.0).run_to_end()  # not looked for
    assert len(rows(tmp_path)) == 30


def test_before_there_is_a_history_nothing_is_a_spike(tmp_path: Path) -> None:
    make_loop(tmp_path, engine=Poisoned("spike"), held_out=False).run_to_end()


def test_rewinding_takes_back_what_was_learned_since_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, said = Poisoned("spike", after=21), list[str]()
    whole = engine.load_state
    loaded: list[torch.Tensor] = []

    def load_state(state: Mapping[str, torch.Tensor]) -> None:
        whole(state)
        loaded.append(engine.weight.detach().clone())

    monkeypatch.setattr(engine, "load_state", load_state)
    make_loop(tmp_path, engine=engine, held_out=False, num_epochs=8.0, on_bad_step="rewind", say=said.append,
              keep_checkpoints=9).run_to_end()
    told = next(text for text in said if "The weights went back" in text)
    assert "to those of checkpoint-20, and the rows of steps 21 to" in told
    assert torch.equal(loaded[0], cp.load_engine_state(tmp_path / "toy" / "checkpoint-20")["master.table"])
    assert len(rows(tmp_path)) == 24


def test_damaged_weights_are_no_rows_fault_and_never_become_a_checkpoint(tmp_path: Path) -> None:
    for policy, name in (("skip", "a"), ("rewind", "b")):
        (tmp_path / name).mkdir()
        loop = make_loop(tmp_path / name, engine=Damaged(after=7, by=math.inf), held_out=False, on_bad_step=policy)
        if policy == "skip":
            with pytest.raises(SparktuneError, match=r"the weights are damaged.*checkpoint-5 is still good"):
                loop.run_to_end()
        else:
            loop.run_to_end()
            result = load_file(tmp_path / name / "toy" / "adapter" / "adapter_model.safetensors")["table"]
            assert result.isfinite().all()
    (tmp_path / "c").mkdir()
    with pytest.raises(SparktuneError, match=r"After step 7 1 tensor holds NaN or infinity: master.table. No"):
        make_loop(tmp_path / "c", engine=Damaged(after=7, by=math.inf), held_out=False, save_steps=7).run_to_end()
    assert not cp.checkpoints_of(tmp_path / "c" / "toy")


@pytest.mark.parametrize(("there", "said"), [
    ({"master.table"}, "1 tensor holds NaN or infinity: master.table. No"),
    ({"exp_avg.table"}, "2 tensors hold NaN or infinity: master.table, exp_avg.table. No"),
])
def test_a_tensor_that_is_damaged_on_two_ranks_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: set[str], said: str
) -> None:
    engine = Damaged(after=7, by=math.inf)
    others = torch.tensor([name in there for name in engine.state()], dtype=torch.uint8)
    loop = make_loop(tmp_path, engine=engine, held_out=False, save_steps=7)
    monkeypatch.setattr(loop.world, "largest", lambda values: torch.maximum(values, others) if engine.steps >= 7 else
                        values)
    with pytest.raises(SparktuneError, match=rf"After step 7 {said}"):
        loop.run_to_end()


def test_a_micro_batch_without_a_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(SparktuneError, match=r"1 of 2 micro-batches have no supervised token at step 1\. It comes from "
                                             r"line 2 of"):
        make_loop(tmp_path, train=ToyBatches(DOCUMENTS, supervised_from=2), held_out=False).run_to_end()


def test_ten_bad_steps_in_a_row_stop_a_run_that_skips(tmp_path: Path) -> None:
    everywhere = ToyBatches([[9, 1, 2]] * 5)
    said: list[str] = []
    with pytest.raises(SparktuneError, match="The loss is nan at step 11"):
        make_loop(tmp_path, engine=Poisoned(), train=everywhere, held_out=False, on_bad_step="skip", num_epochs=9.0,
                  say=said.append).run_to_end()
    assert sum("was skipped" in text for text in said) == 10


def test_a_stop_that_cannot_wait_gives_the_step_up(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    make_loop(tmp_path / "whole", held_out=False).run_to_end()

    class Urgent(ToyBatches):
        def micro_batch(self, epoch: int, index: int) -> MicroBatch:
            if loop.state.step == 6:
                loop.stop.urgent = loop.stop.requested = True
                loop.stop.why = "because memory is short"
            return super().micro_batch(epoch, index)

    loop = make_loop(tmp_path / "parts", train=Urgent(DOCUMENTS), held_out=False)
    with pytest.raises(StoppedResumable, match=r"Stopped after step 6 of 12, because memory is short\. Go on with"):
        loop.run_to_end()
    resumed(tmp_path / "parts", ToyEngine()).run_to_end()
    assert without_clock(tmp_path / "parts") == without_clock(tmp_path / "whole")


@pytest.mark.parametrize(("at", "seconds", "kept", "when"), [
    (1, 1.0, 2, "Stopping after step 2"), (1, 6.0, 1, "Stopping"), (3, 6.0, 1, "Stopping"), (5, 60.0, 2, "Stopping"),
])
def test_a_stop_finishes_the_step_only_where_that_is_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, seconds: float, kept: int, when: str
) -> None:
    """The stop comes in the `at`-th of step 2's five micro-batches, each of which takes `seconds`."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    make_loop(tmp_path / "whole", held_out=False, gradient_accumulation=5).run_to_end()
    said: list[str] = []

    clock = itertools.count(step=1e-3)
    passes: list[int] = []

    class Slow(ToyEngine):
        def _sum(self, batch: MicroBatch) -> torch.Tensor:
            passes.append(loop.state.step)
            loop.stop.requested = passes.count(1) >= at
            return super()._sum(batch)

    engine = Slow()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) + seconds * len(passes))
    loop = make_loop(tmp_path / "parts", engine=engine, held_out=False, gradient_accumulation=5, say=said.append)
    with pytest.raises(StoppedResumable, match=f"Stopped after step {kept} of 4, as you asked"):
        loop.run_to_end()
    monkeypatch.undo()
    told = [text for text in said if text.startswith("Stopping")]
    assert len(told) == 1
    assert told[0] == (f"{when}: writing a checkpoint of 0.0 MB, about 1 s (a guess: this run has written none "
                       "yet).")
    resumed(tmp_path / "parts", ToyEngine(), gradient_accumulation=5).run_to_end()
    assert without_clock(tmp_path / "parts") == without_clock(tmp_path / "whole")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")])
def test_out_of_memory_is_answered_once_with_the_next_policy(tmp_path: Path, error: Exception) -> None:
    class Full(ToyEngine):
        """Has no room in the middle of step 4, until less is kept."""

        steps, policy = 0, "none"

        def _sum(self, batch: MicroBatch) -> torch.Tensor:
            if self.steps == 3 and self.policy == "none" and self.weight.grad is not None:
                raise error
            return super()._sum(batch)

        def optimiser_step(self, learning_rate: float) -> torch.Tensor:
            self.steps += 1
            return super().optimiser_step(learning_rate)

        def recompute_more(self) -> str | None:
            self.drop_gradients()
            self.policy = "norms"
            return self.policy

    for name in ("whole", "full", "hopeless"):
        (tmp_path / name).mkdir()
    make_loop(tmp_path / "whole", held_out=False, recompute="none").run_to_end()
    said: list[str] = []
    make_loop(tmp_path / "full", engine=Full(), held_out=False, say=said.append, recompute="none").run_to_end()
    assert without_clock(tmp_path / "full") == without_clock(tmp_path / "whole")
    told = next(text for text in said if "out of memory" in text)
    assert f"out of memory at step 4 with recompute none ({error}). The step is done again, once, with" in told
    assert "recompute: norms" in (tmp_path / "full" / "toy" / "plan.yaml").read_text()

    class Hopeless(Full):
        def recompute_more(self) -> str | None:
            self.drop_gradients()
            return "norms"  # and keeps as much as before

    with pytest.raises(type(error)):
        make_loop(tmp_path / "hopeless", engine=Hopeless(), held_out=False, recompute="none").run_to_end()
