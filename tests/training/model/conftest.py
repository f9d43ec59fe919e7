"""Tiny models of every family made by transformers (the oracle), rows of documents, and the leak measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from sparktune.kernels.select import OpTable, reference_ops
from sparktune.setup.plan.models import probe
from sparktune.training.batch import MicroBatch
from sparktune.training.model import TextTower, build_model, load_weights
from sparktune.training.packing import build_micro_batch

VOCABULARY = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}
# Grouped value heads: two for each key head, as in Qwen3.5 4B and 9B.
HYBRID: dict[str, Any] = {
    **BASE, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = ("qwen3_5", "qwen3_5_multimodal", "qwen2", "qwen3", "llama", "mistral")


def make_oracle(family: str) -> transformers.PreTrainedModel:
    """A random model of `family` in float32, every tensor away from its initial value."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[], transformers.PreTrainedModel]] = {
        "qwen3_5": lambda: transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**HYBRID)),
        "qwen3_5_multimodal": lambda: transformers.Qwen3_5ForConditionalGeneration(transformers.Qwen3_5Config(
            text_config={**HYBRID, "tie_word_embeddings": True}, vision_config=VISION, tie_word_embeddings=True,
        )),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**BASE, tie_word_embeddings=True)),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**BASE, head_dim=16)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **BASE, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True,
        )),
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(
            **BASE, head_dim=16, sliding_window=9,
        )),
    }
    model = makers[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if name.endswith("A_log"):
                # Slow decay, tens of tokens: a state that survives a boundary would be seen.
                parameter.uniform_(-4.0, -1.0)
    return model


def save_checkpoint(model: transformers.PreTrainedModel, folder: Path) -> Path:
    """Writes config and weights under the names of the model's own state dict, as the published checkpoints have them.

    Not save_pretrained: transformers 5.5.0 writes the multimodal class's keys as
    `model.language_model.language_model.language_model...`.
    """
    model.config.save_pretrained(folder)
    tied = model.config.tie_word_embeddings
    tensors = {k: v.clone() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[transformers.PreTrainedModel, Path]]:
    """family -> (transformers' model, its checkpoint folder), made once."""
    made: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def get(family: str) -> tuple[transformers.PreTrainedModel, Path]:
        if family not in made:
            model = make_oracle(family)
            made[family] = (model, save_checkpoint(model, tmp_path_factory.mktemp(family)))
        return made[family]

    return get


Build = Callable[..., TextTower]


@pytest.fixture
def build() -> Build:
    """(folder, dtype=float32, ops=references) -> our model with the folder's weights."""

    def make(folder: Path, dtype: torch.dtype = torch.float32, ops: OpTable | None = None) -> TextTower:
        spec = probe(str(folder))
        model = build_model(spec, ops or reference_ops(), dtype, "cpu")
        load_weights(model, folder, spec)
        return model

    return make


@pytest.fixture
def documents() -> Callable[..., list[list[int]]]:
    """(lengths, seed=0) -> documents of random token ids."""

    def make(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]

    return make


def lay_out(parts: Sequence[Sequence[int]], pad_to: int | None = None) -> MicroBatch:
    """One row of the documents, by the builder that training uses; every token after a document's first is learned."""
    dataset = [(ids, torch.ones(len(ids), dtype=torch.uint8).numpy()) for ids in parts]
    return build_micro_batch(dataset, range(len(parts)), pad_to)  # only dataset[i] is asked of it


@pytest.fixture
def row() -> Callable[..., MicroBatch]:
    """(documents, pad_to=None) -> micro-batch."""
    return lay_out


def relative(got: torch.Tensor, ref: torch.Tensor) -> float:
    """max|difference| / max|reference|."""
    return ((got - ref).abs().max() / ref.abs().max()).item()


@pytest.fixture
def rel() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The project's meaning of "relative"."""
    return relative


def _seen(model: TextTower, batch: MicroBatch) -> list[torch.Tensor]:
    """Logits [T, V], and what every attention layer is asked with: rotated queries and keys [T, ...].

    Rotary scores depend on differences of positions alone, so positions that do not restart are invisible in logits;
    they show in the rotated keys.
    """
    seen: list[torch.Tensor] = []

    def prologue(*args: Any, **kwargs: Any) -> Any:
        q, k, gate = model.ops.attention_prologue(*args, **kwargs)
        seen.extend((q.flatten(1), k.flatten(1)))
        return q, k, gate

    modules = [m for m in model.modules() if hasattr(m, "n_heads")]
    for module in modules:
        module.ops = replace(module.ops, attention_prologue=prologue)
    try:
        with torch.no_grad():
            return [model.logits(batch), *seen]
    finally:
        for module in modules:
            module.ops = model.ops


@pytest.fixture
def leak() -> Callable[..., float]:
    """(model, documents, batch=their row) -> largest relative difference between packed and alone."""

    def measure(model: TextTower, parts: Sequence[Sequence[int]], batch: MicroBatch | None = None) -> float:
        packed = _seen(model, batch or lay_out(parts))
        worst, start = 0.0, 0
        for part in parts:
            alone = _seen(model, lay_out([part]))
            assert len(alone) == len(packed)
            assert len(alone) > 1, "the model has an attention layer"
            for whole, single in zip(packed, alone, strict=True):
                worst = max(worst, relative(whole[start : start + len(part)], single))
            start += len(part)
        return worst

    return measure
