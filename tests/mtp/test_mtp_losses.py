"""The drafts' losses: closed-form gradients against autograd, blocks, no rows, and logits that never exist at once."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sparktune.mtp import losses
from sparktune.mtp.losses import LossKind, block_loss_reference, depth_weights, draft_losses, plain_losses
from sparktune.mtp.rows import DraftRows

T, H, V = 40, 16, 211


def make_rows(judges: list[int]) -> DraftRows:
    rows = torch.tensor(judges, dtype=torch.long)
    second = rows[torch.isin(rows - 1, rows)]
    labels = torch.arange(T) % V
    return DraftRows(judges=rows, anchors=(rows - 1, second - 2),
                     places=(torch.arange(len(rows)), torch.searchsorted(rows, second)),
                     labels=(labels[rows], labels[second]))


def run(function, kind: str, rows: DraftRows, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    drafts = [torch.randn(T, H, dtype=dtype).requires_grad_() for _ in range(2)]
    hidden, weight = torch.randn(T, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    loss = function(drafts, hidden, weight, rows, kind, [0.6, 0.4])
    return loss.detach(), torch.autograd.grad(loss, drafts)


@pytest.mark.parametrize("kind", get_args(LossKind))
def test_blocks_and_closed_forms_agree_with_autograd(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows([3, 4, 5, 9, 10, 20, 21, 22, 23, 24, 31, 39])
    want = run(plain_losses, kind, rows)
    got = run(draft_losses, kind, rows)
    assert abs(float(got[0] - want[0])) <= 1e-12 * abs(float(want[0]))
    for a, b in zip(got[1], want[1], strict=True):
        assert (a - b).abs().max() <= 1e-12
    heights: list[int] = []

    def watched(base, draft, places, kind):
        heights.append(draft.shape[0])
        return block_loss_reference(base, draft, places, kind)

    monkeypatch.setattr(losses, "block_rows", lambda weight: 5)
    monkeypatch.setattr(losses, "block_loss_reference", watched)
    many = make_rows(list(range(2, 40)))
    blocked, want = run(draft_losses, kind, many), run(plain_losses, kind, many)
    assert max(heights) == 5
    assert abs(float(blocked[0] - want[0])) <= 1e-12 * abs(float(want[0]))
    for a, b in zip(blocked[1], want[1], strict=True):
        assert (a - b).abs().max() <= 1e-12


def test_a_block_of_logits_of_the_real_vocabulary_stays_below_half_a_gibibyte() -> None:
    weight = torch.empty(248_320, 2048, dtype=torch.bfloat16, device="meta")
    assert losses.block_rows(weight) == 1024
    assert losses.block_rows(weight) * 248_320 * 2 <= 2**29


@pytest.mark.parametrize("kind", get_args(LossKind))
def test_no_rows_give_zero_loss_and_zero_gradients(kind: str) -> None:
    loss, gradients = run(draft_losses, kind, make_rows([]))
    assert float(loss) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in gradients)


def test_equal_distributions_cost_nothing_and_lk_is_the_rejection_rate_when_they_overlap() -> None:
    logits = torch.randn(5, V, dtype=torch.float64)
    for kind in ("kl", "lk"):
        draft = logits.clone()
        assert losses.block_loss_reference(logits, draft, torch.arange(5), kind).abs().max() < 1e-12
        assert draft.abs().max() < 1e-12
    other = torch.randn(5, V, dtype=torch.float64)
    p, q = logits.softmax(-1), other.softmax(-1)
    alpha, divergence = torch.minimum(p, q).sum(-1), (p * (p / q).log()).sum(-1)
    lam = (-3 * alpha).exp()
    found = losses.block_loss_reference(logits, other.clone(), torch.arange(5), "lk")
    assert (found - (lam * divergence + (1 - lam) * (1 - alpha))).abs().max() < 1e-12


def test_depths_are_weighted_as_speculators_does() -> None:
    assert depth_weights(1) == [1.0]
    assert depth_weights(2) == pytest.approx([0.625, 0.375])
    assert sum(depth_weights(4)) == pytest.approx(1.0)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="kl, lk, hard; got 'mse'"):
        run(draft_losses, "mse", make_rows([3]))
