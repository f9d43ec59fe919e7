"""The MTP trainer's GPU code in Triton's interpreter against float64: losses and gradients, and drafts' attention."""

import pytest
import torch

from sparktune.mtp import draft_kernels
from sparktune.mtp.draft_attention import draft_attention_fused, draft_attention_reference
from sparktune.mtp.draft_kernels import block_loss_fused
from sparktune.mtp.losses import block_loss_reference


@pytest.mark.parametrize("kind", ["kl", "lk", "hard"])
@pytest.mark.parametrize("vocabulary", [97, 700])
def test_losses_and_gradients(monkeypatch, kind, vocabulary):
    monkeypatch.setattr(draft_kernels, "BV", 256)
    generator = torch.Generator().manual_seed(1)
    base = 3 * torch.randn(4, vocabulary, generator=generator)
    draft = 3 * torch.randn(5, vocabulary, generator=generator)
    places = torch.tensor([0, 3, 3, 1, 2])
    truth = draft.double()
    want = block_loss_reference(base.double(), truth, places, kind)
    got = block_loss_fused(base, draft, places, kind)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (draft - truth).abs().max() <= 1e-6


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "drafts"), [([33, 1, 20], 4, 1, 1), ([40], 2, 2, 2)])
def test_draft_attention_and_its_gradients(lengths, heads, kv_heads, drafts):
    generator = torch.Generator().manual_seed(0)
    total, dim = sum(lengths), 64
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    tensors = [normal(total, heads, dim), normal(total, kv_heads, dim), normal(total, kv_heads, dim),
               normal(drafts, total, kv_heads, dim), normal(drafts, total, kv_heads, dim)]
    do = normal(total, heads, dim)

    def run(attention, dtype):
        given = [t.to(dtype).requires_grad_() for t in tensors]
        o = attention(*given, cu, scale=dim**-0.5)
        return o.detach(), *torch.autograd.grad(o, given, do.to(dtype))

    truth = run(draft_attention_reference, torch.float64)
    for name, tri, ref in zip(("o", "dq", "dk", "dv", "dke", "dve"), run(draft_attention_fused, torch.float32), truth,
                              strict=True):
        assert (tri - ref).abs().max() <= 5e-6 * max(1.0, ref.abs().max()), name
