"""The head against transformers' own decoder layer; the mask of later drafts; documents that stay apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
    Qwen3_5TextRotaryEmbedding,
)

from sparktune.kernels.modules.decoding import AttentionCache
from sparktune.kernels.select import reference_ops
from sparktune.mtp.head import MtpHead, load_head
from sparktune.mtp.rows import draft_rows
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.weights import safetensors_header
from sparktune.training.batch import MicroBatch
from sparktune.training.tower import TextTower

Row = Callable[..., MicroBatch]
Load = Callable[[torch.dtype], tuple[TextTower, MtpHead]]
DOCUMENTS = [[5, 9, 30, 7, 44, 81, 2, 19, 77, 41, 3], [8, 6, 4], [80, 81, 82, 83, 84, 85, 86, 87]]
PROMPTS = [3, 1, 4]


class Oracle:
    """The head put together from transformers' parts, one document at a time; `variant` does one thing wrong."""

    def __init__(self, text: dict[str, Any], held: dict[str, torch.Tensor], variant: str = "") -> None:
        config = Qwen3_5TextConfig(**{**text, "num_hidden_layers": 1, "layer_types": ["full_attention"]})
        config._attn_implementation = "sdpa"
        self.layer = Qwen3_5DecoderLayer(config, 0).eval()
        self.layer.load_state_dict({n.removeprefix("mtp.layers.0."): t for n, t in held.items() if ".layers.0." in n})
        self.norms = {}
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            self.norms[name] = Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.norms[name].load_state_dict({"weight": held[f"mtp.{name}.weight"]})
        self.fc, self.rotary, self.variant = held["mtp.fc.weight"], Qwen3_5TextRotaryEmbedding(config), variant
        if variant == "halves":  # [q of all heads | gate of all heads] instead of [q | gate] head by head
            weight = self.layer.self_attn.q_proj.weight.data.clone()
            heads = weight.view(config.num_attention_heads, 2, config.head_dim, -1)
            self.layer.self_attn.q_proj.weight.data = heads.transpose(0, 1).reshape(weight.shape).clone()

    def enter(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        pair = [self.norms["pre_fc_norm_embedding"](embedded), self.norms["pre_fc_norm_hidden"](hidden)]
        return F.linear(torch.cat(pair[::-1] if self.variant == "order" else pair, -1), self.fc)

    def layer_out(self, u: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(u))[None]
        tables = self.rotary(u[None], positions[None].expand(3, -1, -1))
        out = self.layer(u[None], position_embeddings=tables, attention_mask=None, position_ids=positions)
        return self.norms["norm"](out[0] if out.ndim == 3 else out[0][0])

    def drafts(self, ids: torch.Tensor, hidden: torch.Tensor, embedding: torch.Tensor) -> list[torch.Tensor]:
        """m of depth 1 for rows 0..L - 2, and of depth 2 for rows 0..L - 3."""
        first = self.enter(embedding[ids[1:]], hidden[:-1])
        one = self.layer_out(first)
        second = self.enter(embedding[ids[2:]], one[:-1])
        # The draft of anchor t comes right after step 0's rows 0..t, at the next position: plain causal attention.
        two = [self.layer_out(torch.cat((first[: t + 1], second[t : t + 1])))[-1] for t in range(len(second))]
        return [one, torch.stack(two)]


def normed(tower: TextTower, batch: MicroBatch, variant: str) -> torch.Tensor:
    if variant != "pre-norm":
        return tower(batch)
    final_norm, tower.final_norm = tower.final_norm, lambda delta, h: delta + h
    try:
        return tower(batch)
    finally:
        tower.final_norm = final_norm


def worst(load: Load, text: dict[str, Any], row: Row, variant: str = "") -> float:
    """Largest difference between our drafts and the oracle's, relative to the largest value."""
    tower, head = load(torch.float32)
    batch, oracle = row(DOCUMENTS, PROMPTS), Oracle(text, head.tensors(), variant)
    with torch.no_grad():
        hidden = tower(batch)
        ours = head(batch, hidden, tower.embed_tokens, tower.inv_freq, 2)
        given, found = normed(tower, batch, variant), 0.0
        for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
            for mine, theirs in zip(ours, oracle.drafts(batch.ids[begin:end], given[begin:end], tower.embed_tokens),
                                    strict=True):
                found = max(found, float((mine[begin : begin + len(theirs)] - theirs).abs().max() / theirs.abs().max()))
    return found


def test_both_drafts_agree_with_transformers_layer(loaded: Load, text_config: dict[str, Any], row: Row) -> None:
    assert worst(loaded, text_config, row) <= 1e-5


@pytest.mark.parametrize("variant", ["order", "pre-norm", "halves"])
def test_the_oracle_sees_what_must_not_be_done(
    loaded: Load, text_config: dict[str, Any], row: Row, variant: str
) -> None:
    assert worst(loaded, text_config, row, variant) > 1e-2


def test_serving_with_a_cache_gives_the_same_drafts(loaded: Load, row: Row) -> None:
    tower, head = loaded(torch.float64)
    batch = row(DOCUMENTS[:1], PROMPTS[:1])
    with torch.no_grad():
        hidden = tower(batch)
        one, two = head(batch, hidden, tower.embed_tokens, tower.inv_freq, 2)
        for anchor in (0, 4, len(batch.ids) - 3):
            cache = AttentionCache(64)
            embedded = F.embedding(batch.ids[1 : anchor + 2], tower.embed_tokens)
            m = head.step(embedded, hidden[: anchor + 1], 0, tower.inv_freq, cache)
            assert (m - one[: anchor + 1]).abs().max() < 1e-12
            m = head.step(tower.embed_tokens[batch.ids[anchor + 2]][None], m[-1:], anchor + 1, tower.inv_freq, cache)
            assert (m[0] - two[anchor]).abs().max() < 1e-12


def test_no_document_sees_another_and_no_pair_spans_two(loaded: Load, row: Row) -> None:
    tower, head = loaded(torch.float64)
    head.make_trainable()

    def of_first(documents: list[list[int]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        batch = row(documents, PROMPTS)
        with torch.no_grad():
            hidden = tower(batch)
        made = head(batch, hidden, tower.embed_tokens, tower.inv_freq, 2)
        rows = draft_rows(batch, 2)
        inside = len(documents[0])
        # gradient of the first document's drafts alone
        picked = [m[a[a < inside]] for m, a in zip(made, rows.anchors, strict=True)]
        gradient = torch.autograd.grad(sum((p**2).sum() for p in picked), head.fc)[0]
        return [m.detach()[:inside] for m in made], gradient

    other = [DOCUMENTS[0], [11, 12, 13], DOCUMENTS[2][::-1]]
    (a, grad_a), (b, grad_b) = of_first(DOCUMENTS), of_first(other)
    assert all(float((x - y).abs().max()) == 0.0 for x, y in zip(a, b, strict=True))
    assert torch.equal(grad_a, grad_b)
    batch = row(DOCUMENTS, PROMPTS)
    rows, document = draft_rows(batch, 2), torch.repeat_interleave(torch.arange(3), torch.diff(batch.cu_seqlens).long())
    for k, (anchors, places) in enumerate(zip(rows.anchors, rows.places, strict=True), 1):
        judges = rows.judges[places]
        assert torch.equal(judges, anchors + k)
        # the judged token t + k + 1 is of the anchor's document too
        assert torch.equal(document[judges + 1], document[anchors])
        learned = set(batch.supervised_rows.tolist())
        want = [t for t in range(len(document)) if {t + i for i in range(k + 1)} <= learned
                and document[t] == document[t + k]]
        assert anchors.tolist() == want
    # documents of 11, 3 and 8 tokens with prompts of 3, 1 and 4: 8, 2 and 4 supervised rows
    assert rows.counts() == [7 + 1 + 3, 6 + 0 + 2]


def test_a_head_of_another_family_is_refused(spec: ModelSpec) -> None:
    llama = spec.model_copy(update={"model_type": "llama"})
    with pytest.raises(PreflightError, match=r"is a llama; only dense Qwen3\.5"):
        MtpHead(llama, reference_ops(), dtype=torch.float32, device=torch.device("cpu"))


def test_tensors_go_out_as_they_came_in(loaded: Load, tmp_path: Path) -> None:
    tower, head = loaded(torch.float32)
    before = {n: t.clone() for n, t in head.tensors().items()}
    file = tmp_path / "head.safetensors"
    save_file(before, file)
    places = {n: (file, e) for n, e in safetensors_header(file).items()}
    again = load_head(tower, places, "it")
    again.make_trainable()
    assert len(before) == 15
    assert all(torch.equal(t, before[n]) for n, t in again.tensors().items())
