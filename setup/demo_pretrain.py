"""A few seconds of pre-training for the demo's model: which word follows which, and nothing else.

A model of random weights learns no language in the minutes a demo has. Text seen one word at a time has only so many
different contexts, so every step here sees the whole corpus: counts of token pairs, through the embeddings and the
first blocks' MLPs. Mixers stay random and quiet; context, turns and answers are left to the fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["learn_pairs", "pair_counts", "word_states"]

_STEPS = 60
_RATE = 1e-2
_CONTEXTS = 1024
_MLP_LAYERS = 2
# Keeps the residual stream as small as the embeddings (0.1, not 2.9, for 0.04 nats). Without it the mixers, random
# and a tenth as loud, could no longer be heard: an adapter then needed many times the steps to learn to copy.
_SMALL_STREAM = 5.0
_MIXER_SCALE = 0.3
_TEXT = "model.language_model."


def learn_pairs(tensors: dict[str, torch.Tensor], tokenizer_json: str, texts: Iterable[str], eps: float) -> float:
    """Trains embeddings and MLPs of the first two layers on the pairs of neighbouring tokens in `texts`, in place.

    Args:
        tensors: the checkpoint in float32, tied embeddings; its norms are used as they are, and the mixers' output
            projections are scaled down so that their noise does not drown the rest.
        tokenizer_json: the tokenizer.
        texts: each is taken as an answer: after a blank line, before the end of a turn.
        eps: of the norms.

    Returns:
        The last step's cross-entropy in nats.
    """
    import torch
    from torch.nn import functional

    counts = pair_counts(tokenizer_json, texts, tensors[_TEXT + "embed_tokens.weight"].shape[0])
    contexts = counts.sum(1).topk(_CONTEXTS).indices
    share = counts[contexts] / counts[contexts].sum()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + tensors[_TEXT + name])

    layers = [f"layers.{i}." for i in range(_MLP_LAYERS)]
    names = [_TEXT + "embed_tokens.weight"]
    names += [f"{_TEXT}{layer}mlp.{part}_proj.weight" for layer in layers for part in ("gate", "up", "down")]
    learned = {name: tensors[name].clone().requires_grad_() for name in names}
    optimiser = torch.optim.AdamW(learned.values(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(_STEPS):
        optimiser.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / 5) * (1 - step / _STEPS) ** 0.5
        stream = learned[names[0]][contexts]
        for layer in layers:
            gate, up, down = (learned[f"{_TEXT}{layer}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            inner = norm(stream, f"{layer}post_attention_layernorm.weight")
            stream = stream + (functional.silu(inner @ gate.T) * (inner @ up.T)) @ down.T
        logits = norm(stream, "norm.weight") @ learned[names[0]].T
        loss = -(share * functional.log_softmax(logits, -1)).sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss + _SMALL_STREAM * stream.pow(2).mean())
        optimiser.step()
    tensors.update({name: tensor.detach() for name, tensor in learned.items()})
    for name in tensors:
        if name.startswith(_TEXT) and name.endswith((".o_proj.weight", ".linear_attn.out_proj.weight")):
            tensors[name] = tensors[name] * _MIXER_SCALE
    return float(loss.detach())


def word_states(tensors: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    """Returns [V, H]: what the pre-trained model makes of each word alone, after the final norm, mixers left out."""
    import torch
    from torch.nn import functional

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + tensors[_TEXT + name])

    stream = tensors[_TEXT + "embed_tokens.weight"]
    for layer in (f"layers.{i}." for i in range(_MLP_LAYERS)):
        gate, up, down = (tensors[f"{_TEXT}{layer}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        inner = norm(stream, f"{layer}post_attention_layernorm.weight")
        stream = stream + (functional.silu(inner @ gate.T) * (inner @ up.T)) @ down.T
    return norm(stream, "norm.weight")


def pair_counts(tokenizer_json: str, texts: Iterable[str], vocab_size: int) -> torch.Tensor:
    """Returns [V, V] counts: row a, column b is how often b follows a."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    begin, end = tokenizer.encode("\n\n").ids[0], tokenizer.token_to_id("<|im_end|>")
    ids: list[int] = []
    for text in tokenizer.encode_batch(list(texts)):
        ids += [begin, *text.ids, end]
    tokens = torch.tensor(ids)
    counts = torch.zeros(vocab_size, vocab_size)
    counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(ids) - 1), accumulate=True)
    counts[end] = 0  # what follows a turn's end is another text
    return counts
