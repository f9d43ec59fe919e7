"""The native engine against transformers with PEFT and torch's AdamW: the same losses, step by step.

And against itself: eight micro-batches of one document, or one of eight, are the same step.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from torch.nn import functional as F

from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Plan
from sparktune.training.native_engine import NativeEngine
from sparktune.training.packing import PackPlan

STEPS = 20
VOCAB = 512
CPU = torch.device("cpu")


def documents(count: int, seed: int, longest: int = 24) -> TokenDataset:
    """Random documents of odd lengths; what is learned starts somewhere inside."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest, count)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    supervised = np.zeros(offsets[-1], dtype=np.uint8)
    for start, end in itertools.pairwise(offsets.tolist()):
        supervised[rng.integers(start, end - 1) + 1 : end] = 1
    ids = rng.integers(0, VOCAB, offsets[-1]).astype(np.uint32)
    return TokenDataset(ids, supervised, offsets, np.arange(1, count + 1, dtype=np.int64), key=f"documents {seed}")


def make_plan(model: Path, mode: str, **values: object) -> Plan:
    return Plan(**{
        "model": str(model), "mode": mode, "engine": "native", "dtype": "float32", "recompute": "none", "lora_r": 4,
        "lora_alpha": 8.0, "seed": 11, "weight_decay": 0.1, "max_grad_norm": 0.5, **values,
    })


def rate(step: int, mode: str) -> float:
    """A warm-up; full fine-tuning at a tenth, or rounding differences grow faster than a comparison can bear."""
    return (2e-3 if mode == "lora" else 2e-4) * min(1.0, step / 3)


def native_losses(
    engine: NativeEngine, batches: PackPlan, accumulate: int, steps: int, mode: str = "lora"
) -> list[float]:
    losses = []
    per_epoch = len(batches)
    for step in range(steps):
        first = step * accumulate
        step_batches = [batches.micro_batch(i // per_epoch, i % per_epoch) for i in range(first, first + accumulate)]
        supervised = sum(b.supervised_tokens for b in step_batches)
        losses.append(engine.forward_backward(step_batches, supervised).item())
        engine.optimiser_step(rate(step + 1, mode))
    return losses


def reference_losses(
    model: torch.nn.Module, batches: PackPlan, accumulate: int, steps: int, plan: Plan
) -> list[float]:
    """A plain loop over transformers' model: one document at a time, torch's own AdamW and clipping."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [{"params": [p for p in learning if p.ndim >= 2], "weight_decay": plan.weight_decay},
         {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0}],
        betas=(plan.adam_beta1, plan.adam_beta2), eps=plan.adam_eps,
    )
    losses = []
    per_epoch = len(batches)
    for step in range(steps):
        drawn = [batches.packs(i // per_epoch, i % per_epoch)
                 for i in range(step * accumulate, (step + 1) * accumulate)]
        examples = [batches.dataset[e] for packs in drawn for pack in packs for e in pack]
        supervised = sum(int(mask[1:].sum()) for _, mask in examples)
        total = 0.0
        for ids, mask in examples:
            row = torch.from_numpy(ids.astype(np.int64))[None]
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
            labels = torch.where(torch.from_numpy(mask[1:] > 0), row[0, 1:], -100)
            loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / supervised
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learning, plan.max_grad_norm)
        for group in optimiser.param_groups:
            group["lr"] = rate(step + 1, plan.mode)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
    return losses


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5 of four layers (linear, linear, linear, full), two value heads for each key head, text layout."""
    torch.manual_seed(4)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16, tie_word_embeddings=True, max_position_embeddings=256,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )
    folder = tmp_path_factory.mktemp("hybrid") / "qwen3_5"
    transformers.Qwen3_5ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers with grouped heads."""
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, max_position_embeddings=256,
    )
    folder = tmp_path_factory.mktemp("dense") / "qwen3"
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["hybrid", "dense"])
def model_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("hybrid_model" if request.param == "hybrid" else "dense_model")


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_every_loss_of_twenty_steps_is_that_of_transformers_and_peft(
    model_dir: Path, mode: str, tmp_path: Path
) -> None:
    plan = make_plan(model_dir, mode)
    engine = NativeEngine.build(plan, probe(str(model_dir)), model_dir, CPU)
    batches = PackPlan(documents(24, seed=1), pack=False, pack_length=None, seed=plan.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    if mode == "lora":
        engine.export(tmp_path / "start")
        model = PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    ours = native_losses(engine, batches, 2, STEPS, mode)
    theirs = reference_losses(model.train(), batches, 2, STEPS, plan)
    assert min(theirs) < theirs[0] * 0.97, "the comparison needs losses that move"
    relative = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    print(f"largest relative difference {max(relative):.1e}")
    assert max(relative) < 1e-5, relative


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-10)])
def test_eight_by_one_and_one_by_eight_are_the_same_step(hybrid_model: Path, dtype: str, tolerance: float) -> None:
    spec = probe(str(hybrid_model))
    losses = {}
    for size in (1, 8):
        engine = NativeEngine.build(make_plan(hybrid_model, "lora", dtype=dtype), spec, hybrid_model, CPU)
        batches = PackPlan(
            documents(40, seed=2), pack=False, pack_length=None, per_device_batch_size=size, seed=5,
        )
        losses[size] = native_losses(engine, batches, 8 // size, 10)
    relative = [abs(a - b) / b for a, b in zip(losses[1], losses[8], strict=True)]
    print(f"largest relative difference {max(relative):.1e}")
    assert max(relative) < tolerance, relative


def test_packed_and_unpacked_steps_learn_the_same(hybrid_model: Path) -> None:
    """One pack of all documents, or each alone: one step's loss and gradients agree in float64."""
    spec = probe(str(hybrid_model))
    found = []
    for pack_length in (None, 4096):
        engine = NativeEngine.build(make_plan(hybrid_model, "lora", dtype="float64"), spec, hybrid_model, CPU)
        batches = PackPlan(documents(12, seed=4), pack=pack_length is not None, pack_length=pack_length, seed=5)
        step = [batches.micro_batch(0, i) for i in range(len(batches))]
        loss = engine.forward_backward(step, sum(b.supervised_tokens for b in step))
        found.append((loss, {n: g.clone() for n, g in engine.named_gradients() if g is not None}))
    (loss, gradients), (packed_loss, packed_gradients) = found
    assert abs(loss - packed_loss) / loss < 1e-12
    for name, gradient in gradients.items():
        difference = (gradient - packed_gradients[name]).abs().max()
        assert difference <= 1e-10 * gradient.abs().max(), name


def test_recomputing_changes_nothing(hybrid_model: Path) -> None:
    spec = probe(str(hybrid_model))
    losses: list[list[float]] = []
    for policy in ("none", "norms", "layer", "all"):
        plan = make_plan(hybrid_model, "lora", recompute=policy, lora_dropout=0.3)
        engine = NativeEngine.build(plan, spec, hybrid_model, CPU)
        batches = PackPlan(documents(8, seed=7), pack=True, pack_length=64, seed=5)
        losses.append(native_losses(engine, batches, 1, 3))
    assert losses[1:] == [losses[0]] * 3


def test_an_adapter_goes_on_where_it_was_saved(hybrid_model: Path, tmp_path: Path) -> None:
    spec = probe(str(hybrid_model))
    batches = PackPlan(documents(8, seed=7), pack=False, pack_length=None, seed=5)
    engine = NativeEngine.build(make_plan(hybrid_model, "lora"), spec, hybrid_model, CPU)
    native_losses(engine, batches, 2, 3)
    engine.export(tmp_path / "adapter")
    again = NativeEngine.build(make_plan(tmp_path / "adapter", "lora"), spec, hybrid_model, CPU)
    batch = batches.micro_batch(0, 0)
    assert again.loss_sum(batch).item() == engine.loss_sum(batch).item()
    assert "going on from" in again.describe()


def test_full_fine_tuning_in_bfloat16_keeps_float32_masters(hybrid_model: Path, tmp_path: Path) -> None:
    engine = NativeEngine.build(
        make_plan(hybrid_model, "full", dtype="bfloat16"), probe(str(hybrid_model)), hybrid_model, CPU
    )
    batches = PackPlan(documents(8, seed=7), pack=True, pack_length=128, seed=5)
    losses = native_losses(engine, batches, 1, 8)
    assert losses[-1] < losses[0]
    assert all(g is None for _, g in engine.named_gradients())
    masters = [t for n, t in engine.state().items() if n.startswith("master.")]
    assert all(t.dtype == torch.float32 for t in masters)
    wide = {name.rpartition(".")[2] for name, p in engine.model.named_parameters() if p.dtype != torch.bfloat16}
    assert wide == {"A_log", "dt_bias"}  # exponents of a decay: stored and computed in float32
    engine.export(tmp_path / "weights")
    assert list((tmp_path / "weights").glob("*.safetensors"))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_state_carries_everything(hybrid_model: Path, mode: str) -> None:
    """Three steps, a new engine with the state of the second, the third again: bit for bit."""
    spec = probe(str(hybrid_model))
    plan = make_plan(hybrid_model, mode, lora_dropout=0.2 if mode == "lora" else 0.0)
    batches = PackPlan(documents(8, seed=7), pack=True, pack_length=48, seed=5)
    engine = NativeEngine.build(plan, spec, hybrid_model, CPU)
    native_losses(engine, batches, 1, 2)
    kept = {name: tensor.clone() for name, tensor in engine.state().items()}
    expected = native_losses(engine, batches, 1, 2)
    again = NativeEngine.build(plan, spec, hybrid_model, CPU)
    again.load_state(kept)
    assert native_losses(again, batches, 1, 2) == expected
    for name, tensor in engine.state().items():
        assert torch.equal(tensor, again.state()[name]), name
