"""flash-linear-attention's chunk kernels behind our signature, without the Python around them.

fla's public function validates, copies and builds chunk indices in every layer: 2.65 ms a layer for about 1 ms of
kernels on an H200. Here its forward and backward hosts are called directly, with chunk indices made once for each
packing. On Hopper with Triton 3.4 to 3.7.0 fla computes its gated backward only through the package tilelang (issue
640), and that only for as many key heads as value heads.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from functools import cache
from types import SimpleNamespace

import torch

from sparktune.kernels.tables import boundaries_of

__all__ = ["gated_delta_rule_fla"]

CHUNK = 64
_INDICES: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()
_INDICES_KEPT = 32


@cache
def _fla() -> SimpleNamespace:
    from fla.modules.l2norm import l2norm_bwd, l2norm_fwd
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    return SimpleNamespace(
        norm=l2norm_fwd, norm_backward=l2norm_bwd, forward=chunk_gated_delta_rule_fwd,
        backward=chunk_gated_delta_rule_bwd,
    )


def _chunk_indices(boundaries: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 [chunks, 2]: document, chunk inside the document; kept by value."""
    key = (boundaries, device)
    if key not in _INDICES:
        rows = [
            (document, chunk)
            for document, (begin, end) in enumerate(itertools.pairwise(boundaries))
            for chunk in range(-(-(end - begin) // CHUNK))
        ]
        _INDICES[key] = torch.tensor(rows, dtype=torch.int32).pin_memory().to(device, non_blocking=True)
        while len(_INDICES) > _INDICES_KEPT:
            _INDICES.popitem(last=False)
    return _INDICES[key]


class FlaDeltaRuleFunction(torch.autograd.Function):
    """Saves the normalised q and k, v, the decays, beta and the inverse; fla recomputes the states."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
        beta: torch.Tensor, cu_seqlens: torch.Tensor, chunk_indices: torch.Tensor,
    ) -> torch.Tensor:
        """Returns o [T, HV, V]."""
        q, k, v, g, beta = (x.contiguous()[None] for x in (q, k, v, g, beta))
        q, q_rstd = _fla().norm(q)
        k, k_rstd = _fla().norm(k)
        ctx.scale = k.shape[-1] ** -0.5
        gamma, o, inverse, _, _, _ = _fla().forward(
            q=q, k=k, v=v, g=g, beta=beta, scale=ctx.scale, initial_state=None, output_final_state=False,
            cu_seqlens=cu_seqlens, chunk_indices=chunk_indices,
        )
        ctx.save_for_backward(q, q_rstd, k, k_rstd, v, gamma, beta, inverse, cu_seqlens, chunk_indices)
        return o[0]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of q, k, v, g and beta."""
        q, q_rstd, k, k_rstd, v, gamma, beta, inverse, cu_seqlens, chunk_indices = ctx.saved_tensors
        dq, dk, dv, dbeta, dg, _, _, _ = _fla().backward(
            q=q, k=k, v=v, g=gamma, beta=beta, A=inverse, scale=ctx.scale, initial_state=None,
            do=do.contiguous()[None], dht=None, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices,
        )
        dq, dk = _fla().norm_backward(q, q_rstd, dq), _fla().norm_backward(k, k_rstd, dk)
        return dq[0], dk[0], dv[0], dg[0], dbeta[0], None, None


def gated_delta_rule_fla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
) -> torch.Tensor:
    """The gated delta rule by fla's kernels; arguments and result as `gated_delta_rule_fused`.

    Raises:
        ValueError: `cu_seqlens_cpu` does not rise strictly from 0 to T (fla's kernels would read out of bounds).
        RuntimeError: from fla, on Hopper with Triton 3.4 to 3.7.0 without tilelang.
    """
    boundaries = boundaries_of(cu_seqlens_cpu, q.shape[0])
    return FlaDeltaRuleFunction.apply(q, k, v, g, beta, cu_seqlens, _chunk_indices(boundaries, q.device))
