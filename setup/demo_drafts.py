"""A few seconds of pre-training for the demo model's MTP head, on the same corpus as the model itself.

Like the model (setup/demo_pretrain.py), the head learns from neighbouring words: given what the model makes of one word
and the word that follows, it drafts what the model would say next. Its attention stays random and quiet. So the demo's
default head is worth beating: it knows the base's corpus, and nothing of what fine-tuning adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparktune.setup.demo_pretrain import pair_counts, word_states

if TYPE_CHECKING:
    import torch

__all__ = ["learn_drafts"]

_STEPS = 60
_RATE = 4e-3
_CONTEXTS = 512
_ATTENTION_SCALE = 0.1
_LAYER = "mtp.layers.0."


def learn_drafts(tensors: dict[str, torch.Tensor], tokenizer_json: str, texts: Iterable[str], eps: float) -> float:
    """Trains the head's input projection and MLP, in place.

    Args:
        tensors: the checkpoint in float32, tied embeddings, after `learn_pairs`.
        tokenizer_json: the tokenizer.
        texts: the base's corpus, answers.
        eps: of the norms.

    Returns:
        The last step's divergence from the model, in nats.
    """
    import torch
    from torch.nn import functional

    embedding = tensors["model.language_model.embed_tokens.weight"]
    counts = pair_counts(tokenizer_json, texts, embedding.shape[0])
    words = counts.sum(1).topk(_CONTEXTS).indices
    states = word_states(tensors, eps)
    teacher = (states[words] @ embedding.T).log_softmax(-1)
    before = counts[:, words].T.contiguous()
    before[before.sum(1) == 0] = 1.0
    share = counts[words].sum(1) / counts[words].sum()
    generator = torch.Generator().manual_seed(0)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + tensors[name])

    tensors[_LAYER + "self_attn.o_proj.weight"] *= _ATTENTION_SCALE
    names = ["mtp.fc.weight", *(f"{_LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))]
    learned = {name: tensors[name].clone().requires_grad_() for name in names}
    fc, gate, up, down = learned.values()
    optimiser = torch.optim.AdamW(learned.values(), lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    loss, hidden = torch.zeros(()), states[torch.multinomial(before, 1, generator=generator)[:, 0]]
    for step in range(_STEPS):
        optimiser.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / 5) * (1 - step / _STEPS) ** 0.5
        u = torch.cat((norm(embedding[words], "mtp.pre_fc_norm_embedding.weight"),
                       norm(hidden, "mtp.pre_fc_norm_hidden.weight")), -1) @ fc.T
        inner = norm(u, _LAYER + "post_attention_layernorm.weight")
        drafted = norm(u + (functional.silu(inner @ gate.T) * (inner @ up.T)) @ down.T, "mtp.norm.weight")
        log_q = (drafted @ embedding.T).log_softmax(-1)
        loss = (share * (teacher.exp() * (teacher - log_q)).sum(-1)).sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        # The next step drafts from a word before, or from a draft's own state, as the second draft does.
        previous = torch.multinomial(before, 1, generator=generator)[:, 0]
        hidden = states[previous] if step % 2 else drafted.detach()[torch.randperm(_CONTEXTS, generator=generator)]
    tensors.update({name: tensor.detach() for name, tensor in learned.items()})
    return float(loss.detach())
