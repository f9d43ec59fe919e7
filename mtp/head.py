"""The MTP head of a dense Qwen3.5 as a module: one full-attention layer that drafts the tokens after the next one.

With N the zero-centred RMSNorm, E and W the base's embeddings and output projection, h_t the base's hidden state after
its final norm, and x_{t+1} the token that the base has chosen at t (the anchor):

    u = fc [N(E[x_{t+1}]) ; N(h_t)]          the embedding comes first
    r = u + o_proj(attention(N(u)) * sigmoid(gate)),  y = r + mlp(N(r)),  m_t = N(y)
    W m_t                                     is the draft's distribution over x_{t+2}

The next draft applies the same layer to m_t in the place of h_t, the drafted token's embedding and the next position.
Source: the Qwen3.5 loaders of vLLM and llama.cpp. Legend: T rows, H hidden, K drafts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from sparktune.kernels.modules import Attention, GatedMLP
from sparktune.kernels.modules.decoding import AttentionCache
from sparktune.kernels.modules.full_ft import FullFT_BF16_Linear
from sparktune.kernels.modules.rotary import rotary_tables
from sparktune.kernels.select import OpTable
from sparktune.mtp.draft_attention import select_draft_attention
from sparktune.mtp.tensors import Place, check_head
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.schema import ModelSpec
from sparktune.training.batch import MicroBatch
from sparktune.training.tower import TextTower

__all__ = ["MtpHead", "embedded_tokens", "last_rows", "load_head"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def last_rows(batch: MicroBatch) -> torch.Tensor:
    """Returns int64 [T]: for every row the last one of its document; made where the batch lies, nothing waits."""
    ends = batch.cu_seqlens[1:].long()
    here = torch.arange(batch.ids.shape[0], device=batch.ids.device)
    return ends[torch.bucketize(here, ends, right=True)] - 1


def embedded_tokens(batch: MicroBatch, ahead: int, last: torch.Tensor) -> torch.Tensor:
    """Returns ids [T]: for row t the token at t + ahead of the same document, or the document's last token.

    The last `ahead` rows of a document have no such token. They get one of their own document, so that nothing of the
    next one is ever read; no other row sees them (attention is causal) and none is drafted from.

    Args:
        batch: the documents.
        ahead: tokens ahead.
        last: `last_rows(batch)`.
    """
    here = torch.arange(batch.ids.shape[0], device=batch.ids.device)
    return batch.ids[torch.minimum(here + ahead, last)]


class MtpHead(nn.Module):
    """One layer that drafts; embeddings, output projection and rotary frequencies are the base's.

    Args:
        spec: the base's shape, a dense Qwen3.5.
        ops: the base's ops.
        dtype: compute type.
        device: of the weights.

    Attributes:
        reason: which attention the drafts after the first one use, and why.
    """

    def __init__(self, spec: ModelSpec, ops: OpTable, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        if spec.model_type != "qwen3_5_text":
            raise PreflightError(
                f"{spec.source} is a {spec.model_type}; only dense Qwen3.5 models have an MTP head. Use --mtp skip."
            )
        self.ops, self.eps, self.dtype, self.device = ops, spec.norm_eps, dtype, device
        hidden = spec.hidden_size

        def weight(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, dtype=dtype, device=device), requires_grad=False)

        self.fc = weight(hidden, 2 * hidden)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = weight(hidden), weight(hidden)
        self.input_layernorm, self.post_attention_layernorm = weight(hidden), weight(hidden)
        self.norm = weight(hidden)
        self.self_attn = Attention(spec, None, ops, dtype=dtype, device=device)
        self.mlp = GatedMLP(spec, ops, dtype=dtype, device=device)
        self._draft_attention, self.reason = select_draft_attention(ops)

    def make_trainable(self) -> list[str]:
        """Lets all 15 tensors learn; returns the parameters' names."""
        for owner, name in ((self.self_attn, "qkv_proj"), (self.self_attn, "o_proj"), (self.mlp, "gate_up_proj"),
                            (self.mlp, "down_proj")):
            setattr(owner, name, FullFT_BF16_Linear(getattr(owner, name)))
        self.requires_grad_(True)
        return [name for name, _ in self.named_parameters()]

    def slots(self) -> dict[str, tuple[str, slice]]:
        """Returns checkpoint name -> (parameter, its rows), for the 15 tensors."""
        found = {"mtp.fc.weight": ("fc", slice(None)), "mtp.norm.weight": ("norm", slice(None))}
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            found[f"mtp.{name}.weight"] = (name, slice(None))
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"mtp.layers.0.{name}.weight"] = (name, slice(None))
        for part, owner in (("self_attn", self.self_attn), ("mlp", self.mlp)):
            for group_name, group in owner.named_children():
                for name, rows in group.rows().items():
                    found[f"mtp.layers.0.{part}.{name}.weight"] = (f"{part}.{group_name}.weight", rows)
        for name in ("q_norm", "k_norm"):
            found[f"mtp.layers.0.self_attn.{name}.weight"] = (f"self_attn.{name}", slice(None))
        return found

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the 15 tensors in."""
        parameters = dict(self.named_parameters())
        for name, (parameter, rows) in self.slots().items():
            parameters[parameter][rows].copy_(tensors[name])

    def tensors(self, masters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Returns the 15 tensors by checkpoint name: of the masters where given, as views."""
        values = dict(masters) if masters is not None else {n: p.detach() for n, p in self.named_parameters()}
        return {name: values[parameter][rows] for name, (parameter, rows) in self.slots().items()}

    def enter(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns u [T, H] of token embeddings [T, H] and hidden states [T, H]."""
        norm = self.ops.rms_norm
        pair = torch.cat((
            norm(embedded, self.pre_fc_norm_embedding, self.eps, zero_centred=True),
            norm(hidden, self.pre_fc_norm_hidden, self.eps, zero_centred=True),
        ), dim=-1)
        return F.linear(pair, self.fc)

    def project(self, u: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns q [T, nH, D], k and v [T, nKV, D], the output gate [T, nH, D]."""
        attn = self.self_attn
        x = self.ops.rms_norm(u, self.input_layernorm, self.eps, zero_centred=True)
        q, k, v = attn.qkv_proj(x)
        q, k, gate = self.ops.attention_prologue(
            q.unflatten(-1, (attn.n_heads, -1)), k.unflatten(-1, (attn.n_kv_heads, -1)), attn.q_norm, attn.k_norm,
            cos, sin, self.eps, zero_centred=True, gated=True,
        )
        return q, k, v.unflatten(-1, (attn.n_kv_heads, -1)), gate

    def finish(self, u: torch.Tensor, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Returns m [T, H] of the residual u and the attention's output [T, nH, D]."""
        (mixed,) = self.self_attn.o_proj(self.ops.sigmoid_gate(o, gate).flatten(1))
        x, r = self.ops.add_rms_norm(mixed, u, self.post_attention_layernorm, self.eps, zero_centred=True)
        (y,) = self.mlp.down_proj(self.ops.silu_mul(*self.mlp.gate_up_proj(x)))
        return self.ops.add_rms_norm(y, r, self.norm, self.eps, zero_centred=True)[0]

    def forward(
        self, batch: MicroBatch, hidden: torch.Tensor, embedding: torch.Tensor, inv_freq: torch.Tensor, depth: int
    ) -> list[torch.Tensor]:
        """Returns m [T, H] of every draft 1..depth, given that the earlier drafts were right.

        Row t is the anchor t. Draft k embeds the document's own token t + k (what serving embeds whenever it comes to
        that draft and the earlier ones were accepted) and stands at position t + k - 1. Rows whose document has no
        token t + k hold finite values that mean nothing.

        Args:
            batch: one row of documents, on the head's device.
            hidden: the base's hidden states after its final norm, [T, H].
            embedding: the base's embeddings [V, H].
            inv_freq: the base's rotary frequencies.
            depth: drafts, at least 1.
        """
        attn = self.self_attn
        made: list[torch.Tensor] = []
        past: tuple[torch.Tensor, torch.Tensor] | None = None
        keys, values, last = [], [], last_rows(batch)
        for k in range(1, depth + 1):
            cos, sin = rotary_tables(batch.position_ids + (k - 1), inv_freq)
            u = self.enter(F.embedding(embedded_tokens(batch, k, last), embedding), made[-1] if made else hidden)
            query, key, value, gate = self.project(u, cos, sin)
            if past is None:
                past = (key, value)
                o = self.ops.varlen_attention(
                    query, key, value, batch.cu_seqlens, batch.cu_seqlens_cpu, batch.max_seqlen, scale=attn.scale
                )
            else:
                keys.append(key)
                values.append(value)
                o = self._draft_attention(
                    query, *past, torch.stack(keys), torch.stack(values), batch.cu_seqlens_cpu, scale=attn.scale
                )
            made.append(self.finish(u, o, gate))
        return made

    def step(
        self, embedded: torch.Tensor, hidden: torch.Tensor, first: int, inv_freq: torch.Tensor, cache: AttentionCache
    ) -> torch.Tensor:
        """Serving's form: n rows of one document at positions from `first`, after what `cache` holds.

        Args:
            embedded: embeddings of the tokens after them [n, H].
            hidden: base hidden states, or the last draft's m [n, H].
            first: position of the first row; the cache holds `first` rows.
            inv_freq: the base's rotary frequencies.
            cache: of this head; grows by n rows.

        Returns:
            m [n, H].
        """
        count = hidden.shape[0]
        cos, sin = rotary_tables(torch.arange(first, first + count, device=hidden.device), inv_freq)
        u = self.enter(embedded, hidden)
        query, key, value, gate = self.project(u, cos, sin)
        o = AttentionCache.attend(query, *cache.append(key, value), self.self_attn.scale, None)
        return self.finish(u, o, gate)


def load_head(tower: TextTower, head: Mapping[str, Place], source: str) -> MtpHead:
    """Builds the head of a model from its 15 tensors, in the model's type, on its device.

    Args:
        tower: the base.
        head: where the tensors lie (`find_head`, or a file's header).
        source: what messages call the tensors' source.

    Raises:
        UsageError: not a head of this model (names, shapes, types).
        PreflightError: the base is no dense Qwen3.5, or a file cannot be read.
        SparktuneError: a value is not finite.
    """
    made = MtpHead(tower.spec, tower.ops, dtype=tower.dtype, device=tower.device)
    spec = tower.spec
    check_head(head, {
        "hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size, "head_dim": spec.head_dim,
        "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
    }, source)
    made.fill({name: _read(place) for name, place in head.items()})
    return made


def _read(place: Place) -> torch.Tensor:
    file, entry = place
    with file.open("rb") as stream:
        stream.seek(entry.begin)
        raw = bytearray(stream.read(entry.end - entry.begin))
    if len(raw) != entry.end - entry.begin:
        raise PreflightError(f"{file} became shorter while it was read. Fetch it again.")
    return torch.frombuffer(raw, dtype=_DTYPES[entry.dtype]).view(entry.shape)


