"""How far the merged model is from the trained one where the base was quantised.

What was trained is quantised(W) + scale * B A; what is merged and served is round(W + scale * B A). Both are run over
the same held-out rows. The merged weights come from the base's own files, a block at a time: they need no more memory
than one block: a base that was quantised for want of memory never has to fit whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.modules.static_lora import StaticLoRA
from sparktune.setup.plan.outfolder import write_durably
from sparktune.setup.plan.weights import safetensors_index
from sparktune.training.batch import MicroBatch
from sparktune.training.packing import PackPlan
from sparktune.training.tower import TextTower
from sparktune.training.weights import checkpoint_names

__all__ = ["measure_merge_gap", "write_merge_gap"]

_BATCHES = 8
_MOST_ROWS = 2048
"""Supervised tokens compared at most: the mean is known well enough from some hundred."""
_CHUNK = 128


class _Base:
    """The base's tensors by their names in the text layout."""

    def __init__(self, model: TextTower, model_dir: Path, held: ExitStack) -> None:
        self._index = safetensors_index(model_dir)
        self._names = checkpoint_names(self._index, model.spec)
        self._files = {
            path: held.enter_context(safe_open(path, framework="pt")) for path in set(self._index.values())
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        there = self._names[name]
        return self._files[self._index[there]].get_tensor(there)


def _merged_group(group: nn.Module, prefix: str, base: _Base, model: TextTower) -> ProjectionGroup:
    """Returns the group as the merge writes it (setup/export/merge.py): summed in float32, rounded once."""
    plain = ProjectionGroup(
        group.names, group.out_sizes, group.in_features, bias=group.bias is not None, dtype=model.dtype,
        device=model.device,
    )
    there = group.rows()
    for name, rows in plain.rows().items():
        weight = base[f"{prefix}.{name}.weight"].to(model.device)
        if isinstance(group, StaticLoRA) and name in group.adapted:
            a, b = group.adapter_of(name, group.lora_a, group.lora_b)
            weight = (weight.float() + group.scale * (b.float() @ a.float())).to(weight.dtype)
        plain.weight[rows].copy_(weight)
        if plain.bias is not None:
            plain.bias[rows].copy_(group.bias[there[name]])
    return plain


@contextmanager
def _merged(block: nn.Module, groups: Sequence[tuple[str, nn.Module, str]], base: _Base, model: TextTower
            ) -> Iterator[None]:
    """Puts a block's merged projections in place of the trained ones while the context lasts."""
    trained = [(owner, attribute, getattr(owner, attribute)) for _, owner, attribute in groups]
    try:
        for prefix, owner, attribute in groups:
            setattr(owner, attribute, _merged_group(getattr(owner, attribute), prefix, base, model))
        yield
    finally:
        for owner, attribute, group in trained:
            setattr(owner, attribute, group)


def _merged_hidden(model: TextTower, model_dir: Path, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """Returns the merged model's final hidden states [T, H] of each batch; all batches pass a block together."""
    rows = [model.row_of(batch) for batch in batches]
    streams: list[tuple[torch.Tensor | None, torch.Tensor]] = [
        (None, F.embedding(batch.ids, model.embed_tokens)) for batch in batches
    ]
    groups: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, owner, attribute, _ in model.groups():
        groups.setdefault(int(prefix.split(".")[2]), []).append((prefix, owner, attribute))
    with ExitStack() as held:
        base = _Base(model, model_dir, held)
        for number, block in enumerate(model.layers):
            with _merged(block, groups[number], base, model):
                streams = [block(delta, h, row) for (delta, h), row in zip(streams, rows, strict=True)]
    return [model.final_norm(delta, h) for delta, h in streams]


def _compare(
    model: TextTower, trained: torch.Tensor, merged: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """Compares the next-token distributions of hidden states [S, H], a chunk of rows at a time."""
    kl, differences, largest, agree, losses = [], [], 0.0, 0, [0.0, 0.0]
    for first in range(0, len(targets), _CHUNK):
        part = slice(first, first + _CHUNK)
        logits = [F.linear(hidden[part], model.head_weight).float() for hidden in (trained, merged)]
        p, q = (torch.log_softmax(one, -1) for one in logits)
        kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0))
        difference = (logits[0] - logits[1]).abs()
        differences.append(difference.mean(-1))
        largest = max(largest, difference.max().item())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        for i, one in enumerate((p, q)):
            losses[i] -= one.gather(-1, targets[part, None]).sum().item()
    each, n = torch.cat(kl), len(targets)
    return {
        "kl_mean": each.mean().item(), "kl_max": each.max().item(),
        "logit_difference_mean": torch.cat(differences).mean().item(), "logit_difference_max": largest,
        "same_first_choice": agree / n, "loss_trained": losses[0] / n, "loss_merged": losses[1] / n,
    }


@torch.no_grad()
def measure_merge_gap(model: TextTower, model_dir: Path, batches: Sequence[MicroBatch]) -> dict[str, float]:
    """Compares the model as it was trained with what its merge will be.

    Args:
        model: adapters over a base stored in fewer bits.
        model_dir: the base's folder.
        batches: rows with supervised tokens, on the model's device.

    Returns:
        tokens (compared), kl_mean and kl_max (nats, trained against merged), logit_difference_mean and _max,
        same_first_choice (share), loss_trained and loss_merged (mean cross-entropy).
    """
    seen = [(batch, model(batch)[batch.supervised_rows]) for batch in batches]
    merged = _merged_hidden(model, model_dir, batches)
    ours = torch.cat([hidden for _, hidden in seen])[:_MOST_ROWS]
    theirs = torch.cat([hidden[batch.supervised_rows] for (batch, _), hidden in zip(seen, merged, strict=True)])
    targets = torch.cat([batch.targets for batch in batches])[:_MOST_ROWS]
    return {"tokens": len(targets), **_compare(model, ours, theirs[:_MOST_ROWS], targets)}


def write_merge_gap(
    model: TextTower, model_dir: Path, storage: str, held_out: PackPlan | None, train: PackPlan, path: Path,
    say: Callable[..., None],
) -> None:
    """Measures over the first held-out rows (training rows where none are held out), writes JSON and says the result.

    Args:
        model: as trained.
        model_dir: the base's folder.
        storage: of the base, for the record.
        held_out: rows kept apart, or None.
        train: the training rows.
        path: the file.
        say: tells the user.
    """
    source = held_out if held_out is not None and len(held_out) else train
    batches = [b.to(model.device) for b in islice(source, _BATCHES) if b.supervised_tokens]
    if not batches:
        say("No row with a supervised token to compare the merged model with the trained one on.", "warning")
        return
    found: dict[str, Any] = {
        "base": storage, "rows": "held out" if source is held_out else "training",
        **measure_merge_gap(model, model_dir, batches),
    }
    write_durably(path, json.dumps(found, indent=1) + "\n")
    say(
        f"The base was trained over in {storage}; the merge is made with its original weights. Over {found['tokens']} "
        f"{found['rows']} tokens the merged model's loss is {found['loss_merged']:.4f}, the trained one's "
        f"{found['loss_trained']:.4f}; KL {found['kl_mean']:.2g} on average, {found['kl_max']:.2g} at most; the first "
        f"choice is the same at {found['same_first_choice']:.1%}."
    )
