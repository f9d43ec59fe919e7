"""The peers, each run as its own trainer runs it: transformers + PEFT, Liger's kernels on that, Unsloth.

A variant is a peer and what is changed about it, joined by underscores:

    hf, liger, unsloth     the peer, LoRA, its own gradient checkpointing, bf16 autocast
    _nogc                  without gradient checkpointing
    _full                  full fine-tuning
    _padded                documents of about one length two to a sequence batch, padded, with an attention mask
    _leaky                 the documents of a pack as one sequence without resets: what packing means where nothing
                           keeps them apart in the GDN layers (Unsloth leaves it off for hybrids unless told otherwise)
Without `_padded` and `_leaky` every document is a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparktune.lab.documents import Documents
from sparktune.lab.shapes import LORA_TARGETS, random_documents
from sparktune.training.batch import IGNORE_INDEX

__all__ = ["PEERS", "Peer", "PeerRun", "peer_of", "peer_sequences"]

PEERS = ("hf", "liger", "unsloth")
CHANGES = ("nogc", "full", "padded", "leaky")
PADDED_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A variant, taken apart."""

    name: str
    checkpoint: bool
    full: bool
    layout: str
    """documents, padded or leaky."""


def peer_of(variant: str) -> Peer:
    """Takes a variant apart.

    Raises:
        ValueError: it names no peer, or a change that no peer has.
    """
    name, *changes = variant.split("_")
    unknown = [change for change in changes if change not in CHANGES]
    if name not in PEERS or unknown:
        raise ValueError(f"variant {variant!r} should be native, native_full or one of {', '.join(PEERS)}, with any of "
                         f"{', '.join('_' + change for change in CHANGES)}.")
    layouts = [change for change in changes if change in ("padded", "leaky")]
    if len(layouts) > 1:
        raise ValueError(f"variant {variant!r} asks for two layouts, {' and '.join(layouts)}; choose one.")
    return Peer(name=name, checkpoint="nogc" not in changes, full="full" in changes,
                layout=layouts[0] if layouts else "documents")


def peer_sequences(documents: Documents, supervised: float, layout: str) -> list[dict[str, torch.Tensor]]:
    """Returns the model's arguments (input_ids, labels [B, L], attention_mask if padded) of a step's sequences."""
    packs = [random_documents(list(pack), supervised, seed=7 + i) for i, pack in enumerate(documents.packs)]
    if layout == "leaky":
        return [{"input_ids": torch.cat([ids for ids, _ in pack])[None],
                 "labels": torch.cat([labels for _, labels in pack])[None]} for pack in packs]
    rows = [row for pack in packs for row in pack]
    if layout == "documents":
        return [{"input_ids": ids[None], "labels": labels[None]} for ids, labels in rows]
    rows.sort(key=lambda row: len(row[0]), reverse=True)
    batches = []
    for start in range(0, len(rows), PADDED_BATCH):
        batch = rows[start : start + PADDED_BATCH]
        longest = len(batch[0][0])
        padded = [(longest - len(ids), ids, labels) for ids, labels in batch]
        batches.append({
            "input_ids": torch.stack([torch.cat((ids, ids.new_zeros(n))) for n, ids, _ in padded]),
            "labels": torch.stack([torch.cat((x, x.new_full((n,), IGNORE_INDEX))) for n, _, x in padded]),
            "attention_mask": torch.stack([torch.cat((torch.ones_like(x), x.new_zeros(n))) for n, _, x in padded]),
        })
    return batches


def peer_model(peer: Peer, folder: Path, rank: int, longest: int) -> Any:
    """Returns a peer's model, ready to train."""
    if peer.name == "unsloth":
        return _unsloth_model(peer, folder, rank, longest)
    if peer.name == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_5

        apply_liger_kernel_to_qwen3_5()
    from transformers import Qwen3_5ForCausalLM

    model: Any = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0},
                                                    attn_implementation="sdpa")
    model.config.use_cache = False
    if not peer.full:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
    if peer.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not peer.full:
            model.enable_input_require_grads()
    return model


def _unsloth_model(peer: Peer, folder: Path, rank: int, longest: int) -> Any:
    from unsloth import FastModel

    checkpointing = "unsloth" if peer.checkpoint else False
    how = {"dtype": torch.bfloat16, "load_in_4bit": False, "full_finetuning": peer.full}
    if peer.full:  # with adapters, get_peft_model decides
        how["use_gradient_checkpointing"] = checkpointing
    model, _ = FastModel.from_pretrained(str(folder), max_seq_length=longest, **how)
    if peer.full:
        return model
    return FastModel.get_peft_model(
        model, r=rank, lora_alpha=rank, lora_dropout=0, bias="none", target_modules=LORA_TARGETS,
        use_gradient_checkpointing=checkpointing, random_state=3407,
    )


def fast_path() -> bool:
    """Says whether transformers found the GDN's kernels (fla and causal-conv1d)."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    return bool(modeling_qwen3_5.is_fast_path_available)


class PeerRun:
    """A peer's model and optimiser, and the steps it runs.

    Args:
        peer: which, and how.
        folder: of the model.
        rank: of the adapters.
        longest: tokens of the longest sequence that it will see.
        several: keep the start, for `reset`.

    Raises:
        SystemExit: the GDN's kernels are not installed, so that the peer would run at a tenth of its speed.
    """

    def __init__(self, peer: Peer, folder: Path, rank: int, longest: int, several: bool) -> None:
        self.peer, self.model = peer, peer_model(peer, folder, rank, longest)
        if not fast_path():
            raise SystemExit("transformers finds no fla or causal-conv1d: its GDN layers would run in plain PyTorch, "
                             "which is no comparison. Install both.")
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-5 if peer.full else 2e-4, fused=True)
        self.start = [p.detach().cpu() for p in self.parameters] if several else []

    def reset(self) -> None:
        """Puts what learns back to where it started."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.start, strict=True):
                parameter.copy_(value)
        self.optimiser.state.clear()

    def step_of(self, documents: Documents, supervised: float, layout: str) -> Callable[[], torch.Tensor]:
        """Returns a function that runs one optimiser step over the documents and returns its loss."""
        sequences = [{name: tensor.cuda() for name, tensor in sequence.items()}
                     for sequence in peer_sequences(documents, supervised, layout)]
        counts = [int((sequence["labels"][:, 1:] != IGNORE_INDEX).sum()) for sequence in sequences]

        def step() -> torch.Tensor:
            total = torch.zeros((), device="cuda")
            for sequence, count in zip(sequences, counts, strict=True):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = self.model(**sequence, use_cache=False).loss * (count / sum(counts))
                loss.backward()
                total += loss.detach()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            return total

        return step
