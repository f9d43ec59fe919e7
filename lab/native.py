"""The native engine on a bench's model and documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sparktune.kernels.select import OpTable
from sparktune.lab.shapes import LORA_TARGETS, random_documents
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.schema import Plan
from sparktune.training.batch import IGNORE_INDEX, MicroBatch
from sparktune.training.native_engine import NativeEngine

__all__ = ["Rerun", "build_engine", "documents_row", "micro_batches", "recompute_fields"]


class Rerun:
    """A recorder of graphs (training/graphs.py) for a CPU: its replays run the work again."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work`."""
        work()

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """Runs `work` and returns it."""
        work()
        return work


def recompute_fields(text: str) -> dict[str, object]:
    """Returns a plan's fields for `none`, `norms`, `layer`, `all` or `layer:N`: N layers whole, of the others norms."""
    policy, colon, layers = text.partition(":")
    return {"recompute": policy, "recompute_layers": int(layers) if colon else None}


def build_engine(folder: Path, *, rank: int, full: bool, recompute: str, dtype: str = "bfloat16",
                 ops: OpTable | None = None, device: str = "cuda", quantise_base: str = "none",
                 optimizer: str = "adamw") -> NativeEngine:
    """Returns the engine as a run would build it: LoRA of `rank` (alpha = rank), or full fine-tuning."""
    plan = Plan(
        model=str(folder), mode="full" if full else "lora", dtype=dtype, device=device,
        lora_r=rank, lora_alpha=float(rank), target_modules=LORA_TARGETS, weight_decay=0.01, max_grad_norm=0.0,
        quantise_base=quantise_base, optimizer=optimizer, **recompute_fields(recompute),
    )
    return NativeEngine.build(plan, probe(str(folder)), folder, torch.device(device), ops)


def micro_batches(lengths: list[int], supervised: float, accum: int, device: torch.device,
                  seed: int = 7) -> list[MicroBatch]:
    """Returns `accum` micro-batches of documents of these lengths, the tokens that the peers get."""
    return [documents_row(random_documents(lengths, supervised, seed=seed + i)).to(device) for i in range(accum)]


def documents_row(documents: list[tuple[torch.Tensor, torch.Tensor]], pad_to: int | None = None) -> MicroBatch:
    """Returns the documents, (ids, labels) each, end to end as one micro-batch.

    Args:
        documents: at least one.
        pad_to: tokens of the row; what the documents leave becomes one more document that teaches nothing.
    """
    real, examples = sum(len(ids) for ids, _ in documents), tuple(range(len(documents)))
    if pad_to is not None and pad_to > real:
        padding = torch.zeros(pad_to - real, dtype=torch.int64)
        documents = [*documents, (padding, torch.full_like(padding, IGNORE_INDEX))]
    lengths = torch.tensor([len(ids) for ids, _ in documents])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)))
    shifted = torch.cat([torch.cat((labels[1:], labels.new_full((1,), IGNORE_INDEX))) for _, labels in documents])
    rows = (shifted != IGNORE_INDEX).nonzero().flatten()
    return MicroBatch(
        ids=torch.cat([ids for ids, _ in documents]), position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens.clone(), max_seqlen=int(lengths.max()), supervised_rows=rows,
        targets=shifted[rows], examples=examples, real_tokens=real,
    )
