"""What a draft is taught: the base's distribution (KL), the acceptance rate itself (LK), or the text's tokens (hard).

With p the base's distribution at the judging row and q the draft's, both over the whole vocabulary, and
alpha = sum_v min(p_v, q_v), the probability that sampling accepts the draft:

    kl    KL(p || q)
    lk    lam * KL(p || q) + (1 - lam) * (1 - alpha),   lam = exp(-eta * alpha) taken as a constant
    hard  -log q[token of the text]

`draft_losses` sees the supervised rows only and a block of them at a time: each block's logits are overwritten by their
own gradient and multiplied back, so that logits never outlive a block. The output projection is frozen: there is no
gradient with respect to it. Source of lk: Samarin et al., arXiv 2602.23881; of the depths' weights: vLLM's speculators.
Legend: K depths, S_k rows of depth k, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from sparktune.kernels.precision import working_dtype
from sparktune.mtp.rows import DraftRows

__all__ = ["LossKind", "block_loss_reference", "depth_weights", "draft_losses", "plain_losses"]

LossKind = Literal["kl", "lk", "hard"]
ETA = 3.0
"""The paper's best setting of lk."""
DECAY = 0.6
"""Weight of a depth relative to the one before."""
BLOCK_BYTES = 2**29
"""Room for one block of logits; two blocks (base and draft) exist at a time. 1,081 rows of bf16 at V = 248,320."""

BlockLoss = Callable[[torch.Tensor | None, torch.Tensor, torch.Tensor, LossKind], torch.Tensor]


def depth_weights(depth: int) -> list[float]:
    """Returns the weights of depths 1..depth, which add up to 1: 0.625 and 0.375 for two."""
    raw = [DECAY**k for k in range(depth)]
    return [w / sum(raw) for w in raw]


def block_loss_reference(
    base: torch.Tensor | None, draft: torch.Tensor, places: torch.Tensor, kind: LossKind
) -> torch.Tensor:
    """Returns the loss of every row of a block, and overwrites `draft` with its gradient.

    Args:
        base: the base's logits [B, V]; unused (None) for hard.
        draft: the drafts' logits [S, V].
        places: int64 [S]: the row of `base` that judges each draft; for hard the token it should be.
        kind: which loss.

    Returns:
        [S] float32 (float64 for float64).
    """
    wide = working_dtype(draft)
    log_q = draft.to(wide).log_softmax(-1)
    q = log_q.exp()
    if kind == "hard":
        draft.copy_(q.scatter_add(1, places[:, None], -torch.ones_like(places[:, None], dtype=wide)))
        return -log_q.gather(1, places[:, None])[:, 0]
    assert base is not None, "only hard labels need no base"
    log_p = base.to(wide).log_softmax(-1)[places]
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    if kind == "kl":
        draft.copy_(q - p)
        return divergence
    alpha = torch.minimum(p, q).sum(-1)
    lam = (-ETA * alpha).exp()
    below = q * (q < p)
    slope = q * below.sum(-1, keepdim=True) - below  # of 1 - alpha
    draft.copy_(lam[:, None] * (q - p) + (1 - lam)[:, None] * slope)
    return lam * divergence + (1 - lam) * (1 - alpha)


def _block_loss(weight: torch.Tensor) -> BlockLoss:
    if weight.is_cuda:
        from sparktune.mtp.draft_kernels import block_loss_fused

        return block_loss_fused
    return block_loss_reference


def block_rows(weight: torch.Tensor) -> int:
    """Returns the rows of the base whose logits exist at a time: a multiple of 64, for the matrix units."""
    return max(64, BLOCK_BYTES // (weight.shape[0] * weight.element_size()) // 64 * 64)


def _product(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """gradient [S, V] times weight [V, H], summed in float32."""
    if weight.is_cuda:
        from sparktune.kernels.matmul import matmul_fp32

        return matmul_fp32(gradient, weight)
    return gradient @ weight


class _DraftLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, base: torch.Tensor, rows: DraftRows, kind: LossKind, scales: list[float],
        *drafts: torch.Tensor,
    ) -> torch.Tensor:
        loss_of = _block_loss(weight)
        wide = working_dtype(base)
        total = torch.zeros((), dtype=wide, device=base.device)
        gradients = [torch.empty(d.shape, dtype=wide, device=d.device) for d in drafts]
        edges = [*range(0, base.shape[0], block_rows(weight)), base.shape[0]]
        cuts = [torch.searchsorted(places, torch.tensor(edges)).tolist() for places in rows.places]
        judged = rows.judged or rows.places
        for block, (first, last) in enumerate(itertools.pairwise(edges)):
            judge = None if kind == "hard" else base[first:last] @ weight.t()
            for k, draft in enumerate(drafts):
                low, high = cuts[k][block : block + 2]
                if low == high:
                    continue
                logits = draft[low:high] @ weight.t()
                which = rows.labels[k][low:high] if kind == "hard" else judged[k][low:high] - first
                total += loss_of(judge, logits, which, kind).sum() * scales[k]
                gradients[k][low:high] = _product(logits, weight) * scales[k]
                del logits
            del judge
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [d.dtype for d in drafts]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = [(g * incoming).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, None, None, None, *gradients


def draft_losses(
    drafts: Sequence[torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor, rows: DraftRows, kind: LossKind,
    scales: Sequence[float],
) -> torch.Tensor:
    """Returns sum over depths k of scales[k] * (sum of the losses of depth k's rows).

    Args:
        drafts: m of every depth [T, H] (MtpHead.forward).
        hidden: the base's hidden states after its final norm [T, H]; no gradient reaches them.
        weight: output projection [V, H], frozen.
        rows: the pairs, on the same device.
        kind: which loss.
        scales: factor of every depth.

    Returns:
        0-d float32 (float64 for float64); zero, with zero gradients, without rows.

    Raises:
        ValueError: `kind` is none of LossKind.
    """
    _check_kind(kind)
    gathered = [m.index_select(0, anchors) for m, anchors in zip(drafts, rows.anchors, strict=True)]
    judges = hidden.detach().index_select(0, rows.judges)
    return _DraftLosses.apply(weight.detach(), judges, rows, kind, list(scales), *gathered)


def plain_losses(
    drafts: Sequence[torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor, rows: DraftRows, kind: LossKind,
    scales: Sequence[float],
) -> torch.Tensor:
    """The same sum through autograd, with all logits of the supervised rows in memory: the oracle, and lm_head_opt off.

    Raises:
        ValueError: `kind` is none of LossKind.
    """
    _check_kind(kind)
    wide = working_dtype(hidden)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    log_p = F.linear(hidden.detach()[rows.judges], weight.detach()).to(wide).log_softmax(-1)
    judged = rows.judged or rows.places
    for m, anchors, places, labels, scale in zip(drafts, rows.anchors, judged, rows.labels, scales, strict=True):
        log_q = F.linear(m[anchors], weight.detach()).to(wide).log_softmax(-1)
        if kind == "hard":
            total = total + scale * F.nll_loss(log_q, labels, reduction="sum")
            continue
        judge = log_p[places]
        divergence = (judge.exp() * (judge - log_q)).sum(-1)
        if kind == "lk":
            alpha = torch.minimum(judge.exp(), log_q.exp()).sum(-1)
            lam = (-ETA * alpha.detach()).exp()
            divergence = lam * divergence + (1 - lam) * (1 - alpha)
        total = total + scale * divergence.sum()
    return total


def _check_kind(kind: str) -> None:
    if kind not in get_args(LossKind):
        raise ValueError(f"loss should be one of {', '.join(get_args(LossKind))}; got {kind!r}.")
