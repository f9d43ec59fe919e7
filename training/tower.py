"""The text tower: one dense block, one GDN block, five families; every document for itself.

transformers gives the config and the oracle of the tests; this forward pass is our own.
Legend: T tokens of a row, H hidden, V vocabulary, S supervised rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparktune.kernels.modules import Attention, DropoutKey, GatedDeltaNet, GatedMLP, RecomputedOutputs, Row
from sparktune.kernels.modules.decoding import AttentionCache, DeltaNetCache
from sparktune.kernels.modules.rotary import inverse_frequencies, rotary_tables
from sparktune.kernels.select import OpTable
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.schema import ModelSpec
from sparktune.training.batch import MicroBatch

__all__ = ["Block", "RecomputePolicy", "Slot", "TextTower"]

RecomputePolicy = Literal["none", "norms", "layer", "all"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a tensor of the checkpoint lives in the model."""

    parameter: str
    """Name in `named_parameters()`."""
    rows: slice
    """Its rows of that parameter."""
    shape: tuple[int, ...]
    """Its shape in the checkpoint."""

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the view of `parameter` (or of a tensor of its shape, a master) that is this tensor."""
        return parameter[self.rows].view(self.shape)


class Block(nn.Module):
    """Norm, token mixer, norm, MLP; the residual sum is fused into the norm that follows it."""

    def __init__(
        self, spec: ModelSpec, layer: int, ops: OpTable, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.ops, self.eps, self.zero_centred = ops, spec.norm_eps, spec.zero_centred_norm
        kind = spec.layer_types[layer]
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(spec, ops, dtype=dtype, device=device)
        else:
            window = spec.sliding_window if kind == "sliding_attention" else None
            self.self_attn = Attention(spec, window, ops, dtype=dtype, device=device)
        self.mlp = GatedMLP(spec, ops, dtype=dtype, device=device)
        self.input_layernorm = _frozen(spec.hidden_size, dtype=dtype, device=device)
        self.post_attention_layernorm = _frozen(spec.hidden_size, dtype=dtype, device=device)

    @property
    def mixer(self) -> Attention | GatedDeltaNet:
        """The token mixer."""
        return self.linear_attn if hasattr(self, "linear_attn") else self.self_attn

    def new_cache(self, capacity: int) -> AttentionCache | DeltaNetCache:
        """Returns an empty cache for generating up to `capacity` tokens, prompt included."""
        return DeltaNetCache() if hasattr(self, "linear_attn") else AttentionCache(capacity)

    def forward(
        self, delta: torch.Tensor | None, h: torch.Tensor, row: Row,
        cache: AttentionCache | DeltaNetCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and returns the residual stream [T, H] as two summands: the last block's output and the rest."""
        x, h = self.enter(delta, h)
        return self.leave(x, h, row, cache)

    def enter(self, delta: torch.Tensor | None, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mixer's input and the whole residual stream, each [T, H]: all that the block depends on."""
        if delta is None:
            return self.ops.rms_norm(h, self.input_layernorm, self.eps, zero_centred=self.zero_centred), h
        return self.ops.add_rms_norm(delta, h, self.input_layernorm, self.eps, zero_centred=self.zero_centred)

    def leave(
        self, x: torch.Tensor, h: torch.Tensor, row: Row, cache: AttentionCache | DeltaNetCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `forward` returns, from what `enter` gave."""
        x, h = self.ops.add_rms_norm(
            self.mixer(x, row, cache), h, self.post_attention_layernorm, self.eps, zero_centred=self.zero_centred
        )
        return self.mlp(x, row), h

    def summed(self, h: torch.Tensor, row: Row) -> torch.Tensor:
        """The block as one function of one tensor, so that a checkpoint of it keeps one tensor."""
        delta, h = self(None, h, row)
        return h + delta


def _frozen(*size: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(*size, dtype=dtype, device=device), requires_grad=False)


class TextTower(nn.Module):
    """A causal language model over rows of documents; made by training/model.py, filled by training/weights.py.

    Attributes:
        spec: its shape.
        dropout_seed: seed of adapter dropout.
        dropout_calls: training forward passes so far; with the seed it fixes every mask. Part of a resume's state.
        recompute: policy of the backward pass; set by `set_recompute`.
        whole_blocks: the first blocks, so many of them, are computed again from an input; set there too.
    """

    def __init__(self, spec: ModelSpec, ops: OpTable, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec, self.ops, self.dtype, self.device = spec, ops, dtype, device
        self.dropout_seed, self.dropout_calls = 0, 0
        self.recompute: RecomputePolicy = "none"
        self.whole_blocks = 0
        self._recomputed: RecomputedOutputs | None = None
        self.embed_tokens = _frozen(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            Block(spec, layer, ops, dtype=dtype, device=device) for layer in range(spec.num_layers)
        )
        self.norm = _frozen(spec.hidden_size, dtype=dtype, device=device)
        self.lm_head = (
            None if spec.tie_word_embeddings
            else _frozen(spec.vocab_size, spec.hidden_size, dtype=dtype, device=device)
        )
        self.register_buffer("inv_freq", inverse_frequencies(
            spec.rope_theta, spec.rope_dim, spec.rope_scaling, torch.promote_types(dtype, torch.float32), device
        ), persistent=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, H] of the output projection."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def set_recompute(self, policy: RecomputePolicy, layers: int | None = None) -> None:
        """Chooses what the backward pass computes again.

        none: nothing. norms: outputs of norms, activations and gates. layer: every block from its input.
        all: blocks in groups of about sqrt(layers), each group from its input, so that few residuals are kept.

        Args:
            policy: one of these.
            layers: under `layer`, only so many of the first blocks, and `norms` for the others, whose activations are
                gone by the time the first blocks need room to be computed again. None: every block.

        Raises:
            UsageError: an unknown policy, or a number of layers that it or the model does not have.
        """
        if policy not in get_args(RecomputePolicy):
            raise UsageError(f"recompute {policy!r} should be one of {', '.join(get_args(RecomputePolicy))}.")
        if layers is not None and (policy != "layer" or not 1 <= layers <= len(self.layers)):
            raise UsageError(
                f"--recompute-layers should be 1 to {len(self.layers)} and goes with --recompute layer; seen: {layers} "
                f"with --recompute {policy}. Change it or leave it out."
            )
        self.recompute = policy
        every = len(self.layers)
        self.whole_blocks = {"layer": every if layers is None else layers, "all": every}.get(policy, 0)
        keeps = policy != "none" and self.whole_blocks < every
        self._recomputed = RecomputedOutputs(self.ops) if keeps else None
        for i, block in enumerate(self.layers):
            ops = self._recomputed.ops if self._recomputed and i >= self.whole_blocks else self.ops
            for module in block.modules():
                if hasattr(module, "ops"):
                    module.ops = ops

    def slots(self) -> dict[str, Slot]:
        """Returns checkpoint name (text layout, `model.layers.0. ...`) -> where it lives, for the whole tower."""
        found: dict[str, Slot] = {}
        for path, parameter in self.named_parameters():
            owner_path, _, leaf = path.rpartition(".")
            owner = self.get_submodule(owner_path)
            if leaf.startswith("lora_"):
                continue
            if hasattr(owner, "rows"):
                base = owner_path.rpartition(".")[0]
                for name, rows in owner.rows().items():
                    shape = (rows.stop - rows.start, *parameter.shape[1:])
                    found[f"model.{base}.{name}.{leaf}"] = Slot(parameter=path, rows=rows, shape=shape)
                continue
            shape = tuple(parameter.shape)
            if leaf == "conv1d":
                shape = (shape[0], 1, shape[1])
            name = "lm_head.weight" if path == "lm_head" else f"model.{path}"
            if leaf not in ("A_log", "dt_bias", "lm_head"):
                name += ".weight"
            found[name] = Slot(parameter=path, rows=slice(0, shape[0]), shape=shape)
        return found

    def groups(self) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
        """Yields (checkpoint prefix `model.layers.0.self_attn`, owner, attribute, projection group)."""
        for path, module in list(self.named_modules()):
            for name, child in list(module.named_children()):
                if hasattr(child, "rows"):
                    yield f"model.{path}", module, name, child

    @property
    def group_size(self) -> int:
        """Of the first `whole_blocks`, how many are computed again from one kept input."""
        return math.isqrt(len(self.layers) - 1) + 1 if self.recompute == "all" else 1

    def row_of(self, batch: MicroBatch) -> Row:
        """Returns what every layer needs to know of a micro-batch."""
        cos, sin = rotary_tables(batch.position_ids, self.inv_freq)
        key = None
        if self.training and torch.is_grad_enabled():
            key = DropoutKey(seed=self.dropout_seed, call=self.dropout_calls)
            self.dropout_calls += 1
        return Row(
            cu_seqlens=batch.cu_seqlens, cu_seqlens_cpu=batch.cu_seqlens_cpu,
            positions=batch.position_ids.to(torch.int32), max_seqlen=batch.max_seqlen, cos=cos, sin=sin, dropout=key,
        )

    def saving(self) -> contextlib.AbstractContextManager[object]:
        """Returns the context of a forward pass whose graph is kept: blocks under `norms` keep recipes there."""
        return self._recomputed.saving() if self._recomputed else contextlib.nullcontext()

    def final_norm(self, delta: torch.Tensor | None, h: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states that the head reads, [T, H]."""
        zero_centred, eps = self.spec.zero_centred_norm, self.spec.norm_eps
        ops = self._recomputed.ops if self._recomputed else self.ops
        if delta is None:
            return ops.rms_norm(h, self.norm, eps, zero_centred=zero_centred)
        return ops.add_rms_norm(delta, h, self.norm, eps, zero_centred=zero_centred)[0]

    def _group_of_blocks(self, first: int, last: int, h: torch.Tensor, row: Row) -> torch.Tensor:
        for block in self.layers[first:last]:
            h = checkpoint(block.summed, h, row, use_reentrant=False, preserve_rng_state=False)
        return h

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Returns the hidden states after the final norm, [T, H].

        Args:
            batch: one row of documents, on the model's device.
        """
        row = self.row_of(batch)
        h = F.embedding(batch.ids, self.embed_tokens)
        whole = self.whole_blocks if torch.is_grad_enabled() else 0
        # Without a global generator's state to keep: dropout masks are a function of row.dropout.
        summed = whole if whole == len(self.layers) else max(whole - 1, 0)
        for first in range(0, summed, self.group_size):
            last = min(first + self.group_size, summed)
            if self.group_size == 1:
                h = self._group_of_blocks(first, last, h, row)
            else:
                h = checkpoint(
                    self._group_of_blocks, first, last, h, row, use_reentrant=False, preserve_rng_state=False,
                )
        delta = None
        if 0 < whole < len(self.layers):  # as between any two blocks that keep what they computed
            delta, h = checkpoint(self.layers[whole - 1], None, h, row, use_reentrant=False, preserve_rng_state=False)
        with self.saving():
            for block in self.layers[whole:]:
                delta, h = block(delta, h, row)
            return self.final_norm(delta, h)

    def loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        """Returns the sum of the cross-entropy over the supervised rows: 0-d float32 (float64 in float64)."""
        return self.head_loss(self(batch), batch)

    def head_loss(self, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Returns the sum of the cross-entropy of hidden states [T, H] that `forward` gave for `batch`."""
        return self.ops.linear_cross_entropy(hidden, self.head_weight, batch.supervised_rows, batch.targets)

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Returns all logits [T, V]; for tests and short texts, never for training."""
        return F.linear(self(batch), self.head_weight)

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int],
        agree: Callable[[int], int] | None = None,
    ) -> list[int]:
        """Returns the greedy continuation, the stop token included if met.

        Keys, values, convolution inputs and states are kept, so each token costs one pass of one token.

        Args:
            prompt_ids: at least one token.
            max_new_tokens: longest continuation.
            stop_ids: tokens that end it.
            agree: of several ranks that compute one answer together, gives all of them the same next token: who went
                its own way after a near tie would leave the others waiting.
        """
        if not prompt_ids:
            raise ValueError("prompt_ids is empty; generation needs at least one token to start from.")
        caches = self.new_caches(len(prompt_ids) + max_new_tokens)
        answer: list[int] = []
        ids, start = list(prompt_ids), 0
        for _ in range(max_new_tokens):
            token = int(F.linear(self.read_on(ids, start, caches)[-1:], self.head_weight).argmax())
            token = token if agree is None else agree(token)
            answer.append(token)
            if token in stop_ids:
                break
            start += len(ids)
            ids = [token]
        return answer

    def new_caches(self, capacity: int) -> list[AttentionCache | DeltaNetCache]:
        """Returns every layer's empty cache for a document of up to `capacity` tokens."""
        return [block.new_cache(capacity) for block in self.layers]

    @torch.no_grad()
    def read_on(
        self, ids: Sequence[int], start: int, caches: Sequence[AttentionCache | DeltaNetCache]
    ) -> torch.Tensor:
        """Returns the hidden states [n, H] after the final norm of n more tokens of one document.

        Args:
            ids: the tokens.
            start: position of the first; the caches hold as many tokens.
            caches: from `new_caches`; they grow by n.
        """
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        positions = torch.arange(start, start + len(ids), device=self.device)
        cos, sin = rotary_tables(positions, self.inv_freq)
        row = Row(
            cu_seqlens=cu_seqlens.to(self.device), cu_seqlens_cpu=cu_seqlens, positions=positions.to(torch.int32),
            max_seqlen=len(ids), cos=cos, sin=sin,
        )
        delta, h = None, F.embedding(torch.tensor(ids, device=self.device), self.embed_tokens)
        for block, cache in zip(self.layers, caches, strict=True):
            delta, h = block(delta, h, row, cache)
        return self.final_norm(delta, h)
