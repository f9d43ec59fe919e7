"""A tiny Qwen3.5 with its tower and head in any type, rows of documents, and the demo's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from sparktune.kernels.select import reference_ops
from sparktune.mtp.extract_upstream_mtp import find_head
from sparktune.mtp.head import MtpHead, load_head
from sparktune.setup.demo_model import make_model
from sparktune.setup.plan.models import probe
from sparktune.training.batch import MicroBatch
from sparktune.training.model import TextTower, build_model, load_weights

Loaded = tuple[TextTower, MtpHead]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the demo's shape with a small vocabulary."""
    return make_model(tmp_path_factory.mktemp("mtp") / "tiny", vocab_size=512, dtype="float32")


@pytest.fixture(scope="session")
def loaded(tiny: Path) -> Callable[[torch.dtype], Loaded]:
    """dtype -> (tower, head) of the tiny model, references, on the CPU."""

    def make(dtype: torch.dtype) -> Loaded:
        spec = probe(str(tiny))
        tower = build_model(spec, reference_ops(), dtype, "cpu")
        load_weights(tower, tiny, spec)
        return tower, load_head(tower, find_head(tiny), "tiny")

    return make


@pytest.fixture(scope="session")
def row() -> Callable[..., MicroBatch]:
    """(documents, first supervised row of each) -> their micro-batch."""

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
