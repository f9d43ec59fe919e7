"""A very small Qwen3.5 in memory, tower and head in any type, and rows of documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sparktune.kernels.select import reference_ops
from sparktune.mtp.head import MtpHead
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import ModelSpec
from sparktune.training.batch import MicroBatch
from sparktune.training.model import TextTower, build_model

Loaded = tuple[TextTower, MtpHead]
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu",
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "attn_output_gate": True, "mtp_num_hidden_layers": 1,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "max_position_embeddings": 512,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                        "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
}


@pytest.fixture(scope="session")
def text_config() -> dict[str, Any]:
    """The small model's text config."""
    return TEXT


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The small model's shape."""
    folder: Path = tmp_path_factory.mktemp("mtp")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": TEXT,
                                                    "tie_word_embeddings": True}))
    return probe(str(folder))


@pytest.fixture(scope="session")
def loaded(spec: ModelSpec) -> Callable[..., Loaded]:
    """(dtype, seed=0) -> (tower, head) of random weights that make every part of the model heard."""

    def make(dtype: torch.dtype, seed: int = 0) -> Loaded:
        tower = build_model(spec, reference_ops(), dtype, "cpu")
        head = MtpHead(spec, reference_ops(), dtype=dtype, device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for owner in (tower, head):
                for name, p in owner.named_parameters():
                    drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    if name.endswith("A_log"):
                        drawn = drawn.clamp(-1, 1) - 2.5  # slow decay: a state that survives is seen
                    elif "norm" in name:
                        drawn = 0.1 * drawn + (1.0 if "linear_attn.norm" in name else 0.0)
                    elif name != "linear_attn.dt_bias":
                        drawn = 0.2 * drawn
                    p.copy_(drawn)
        return tower.eval().requires_grad_(False), head

    return make


@pytest.fixture(scope="session")
def row() -> Callable[..., MicroBatch]:
    """(documents, first supervised token of each) -> their micro-batch."""

    def make(documents: Sequence[Sequence[int]], prompts: Sequence[int]) -> MicroBatch:
        lengths = [len(d) for d in documents]
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        ids = torch.tensor([token for d in documents for token in d])
        learned = torch.cat([
            torch.arange(start + prompt - 1, start + length - 1)
            for start, prompt, length in zip(starts.tolist(), prompts, lengths, strict=False)
        ])
        return MicroBatch(
            ids=ids, position_ids=torch.cat([torch.arange(n) for n in lengths]), cu_seqlens=starts,
            cu_seqlens_cpu=starts.clone(), max_seqlen=max(lengths), supervised_rows=learned, targets=ids[learned + 1],
            examples=tuple(range(len(documents))), real_tokens=len(ids),
        )

    return make
