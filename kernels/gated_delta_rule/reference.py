"""The gated delta rule in plain PyTorch: token by token (the oracle) and in chunks of 64 (what trains on a CPU).

Source: Yang, Kautz and Hatamizadeh 2024 (Gated Delta Networks), chunked form of section 3.3; the WY form of the product
of Householder-like factors is of Yang et al. 2024 (DeltaNet).
Legend: T tokens, N documents, HK key heads, HV value heads, K and V head dims, C chunk, NC chunks, B documents alive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparktune.kernels.precision import working_dtype

__all__ = [
    "gated_delta_rule_last_state", "gated_delta_rule_naive", "gated_delta_rule_reference", "gated_delta_rule_step",
    "gdn_gates_reference",
]

NORM_EPS = 1e-6
CHUNK = 64


def gdn_gates_reference(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log decay g = -exp(A_log) * softplus(a + dt_bias) and the write strength beta = sigmoid(b).

    Args:
        a: [T, HV].
        b: [T, HV].
        A_log: [HV].
        dt_bias: [HV].

    Returns:
        g and beta, [T, HV], float32 (float64 for float64 a).
    """
    wide = working_dtype(a)
    g = -torch.exp(A_log.to(wide)) * F.softplus(a.to(wide) + dt_bias.to(wide))
    return g, torch.sigmoid(b.to(wide))


def _normalise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def _prepared(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Wide, normalised and scaled q and k for every value head, v, the decay factor, and beta."""
    wide = working_dtype(q)
    groups = v.shape[1] // q.shape[1]
    queries = (_normalise(q.to(wide)) * q.shape[-1] ** -0.5).repeat_interleave(groups, dim=1)
    keys = _normalise(k.to(wide)).repeat_interleave(groups, dim=1)
    return queries, keys, v.to(wide), g.to(wide).exp(), beta.to(wide)


def _token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, t: int,
    state: torch.Tensor, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token t of the recurrence: its output [1, HV, V] and the new state."""
    state = state * decay[t, :, None, None]
    recalled = torch.einsum("hk,hkv->hv", k[t], state)
    state = state + torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * (v[t] - recalled))
    return torch.einsum("hk,hkv->hv", q[t], state)[None].to(dtype), state


def gated_delta_rule_naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
) -> torch.Tensor:
    """The recurrence itself, token by token, document by document; slow, the oracle of tests.

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - k_t^T exp(g_t) S_{t-1}))^T, o_t = S_t^T q_t / sqrt(K), S = 0 where a
    document starts. Arguments and result: `gated_delta_rule_reference`.
    """
    prepared = _prepared(q, k, v, g, beta)
    starts = set(cu_seqlens_cpu[:-1].tolist())
    state = torch.zeros(v.shape[1], q.shape[2], v.shape[2], dtype=working_dtype(q), device=q.device)
    outputs = []
    for t in range(q.shape[0]):
        out, state = _token(*prepared, t, torch.zeros_like(state) if t in starts else state, q.dtype)
        outputs.append(out)
    return torch.cat(outputs)


def _chunk_plan(cu_seqlens_cpu: torch.Tensor, chunk: int) -> tuple[torch.Tensor, list[int]]:
    """Lays the documents' chunks out by time: first chunks of all documents, then second chunks, ...

    Documents are ranked by length, longest first, so that those still alive at step i are a prefix of those at i - 1
    and each step of the recurrence is one contiguous slice.

    Returns:
        [T] row of each token in the padded [NC * C] layout, and the number of documents alive at each step.
    """
    lengths = torch.diff(cu_seqlens_cpu).long()
    chunks = (lengths + chunk - 1) // chunk
    rank = torch.empty_like(chunks)
    rank[torch.argsort(chunks, descending=True, stable=True)] = torch.arange(chunks.shape[0])
    alive = [int((chunks > i).sum()) for i in range(int(chunks.max()))]
    first = torch.tensor([0, *alive]).cumsum(0)
    position = torch.arange(int(lengths.sum())) - torch.repeat_interleave(cu_seqlens_cpu[:-1].long(), lengths)
    slot = first[position // chunk] + torch.repeat_interleave(rank, lengths)
    return slot * chunk + position % chunk, alive


def _chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [T, HV, V] and the last state [B, HV, K, V] of the documents with the most chunks."""
    wide = working_dtype(q)
    groups = v.shape[1] // q.shape[1]
    place, alive = _chunk_plan(cu_seqlens_cpu, CHUNK)
    place = place.to(q.device)
    rows = sum(alive) * CHUNK

    def lay_out(x: torch.Tensor) -> torch.Tensor:
        """[T, heads, ...] -> [NC, heads, C, ...]; padding is zero: it neither decays, writes nor reads."""
        padded = torch.zeros(rows, *x.shape[1:], dtype=wide, device=x.device).index_copy(0, place, x.to(wide))
        return padded.unflatten(0, (-1, CHUNK)).transpose(1, 2)

    queries = lay_out(_normalise(q.to(wide)) * q.shape[-1] ** -0.5).repeat_interleave(groups, dim=1)
    keys = lay_out(_normalise(k.to(wide))).repeat_interleave(groups, dim=1)
    values, strength, decay = lay_out(v), lay_out(beta)[..., None], lay_out(g).cumsum(-1)

    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    # Masked before exp: above the diagonal the difference is positive and would overflow.
    ratio = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    from_start, to_end = decay.exp()[..., None], (decay[..., -1:] - decay).exp()[..., None]

    # WY form: (I + tril(beta k k^T * ratio, -1)) [u | w] = beta [v | exp(decay) k]; the unit diagonal is implied.
    coupling = (keys * strength) @ keys.mT * ratio
    pair = torch.cat((values, keys * from_start), dim=-1) * strength
    pair = torch.linalg.solve_triangular(coupling, pair, upper=False, unitriangular=True)
    written, recalled = pair.split((v.shape[-1], q.shape[-1]), dim=-1)

    query_in, key_out, keep = queries * from_start, keys * to_end, decay[..., -1, None, None].exp()
    state = torch.zeros(alive[0], v.shape[1], q.shape[2], v.shape[2], dtype=wide, device=q.device)
    news, inter, begin = [], [], 0
    for living in alive:
        step = slice(begin, begin + living)
        state = state[:living]
        new = written[step] - recalled[step] @ state
        news.append(new)
        inter.append(query_in[step] @ state)
        state = state * keep[step] + key_out[step].mT @ new
        begin += living
    out = torch.cat(inter) + (queries @ keys.mT * ratio) @ torch.cat(news)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, place).to(q.dtype), state


def gated_delta_rule_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, cu_seqlens: torch.Tensor,
    cu_seqlens_cpu: torch.Tensor,
) -> torch.Tensor:
    """Returns the gated delta rule's output, the state zero at the start of every document.

    Args:
        q: [T, HK, K]; l2-normalised inside (eps 1e-6), scaled by K ** -0.5.
        k: [T, HK, K]; l2-normalised inside.
        v: [T, HV, V]; value head h uses key head h // (HV / HK).
        g: [T, HV], log decay, <= 0.
        beta: [T, HV], write strength in (0, 1).
        cu_seqlens: int32 [N + 1], from 0 to T, strictly increasing.
        cu_seqlens_cpu: the same on the host.

    Returns:
        [T, HV, V] of q's dtype; computed in float32 (float64 for float64).
    """
    return _chunked(q, k, v, g, beta, cu_seqlens_cpu)[0]


def gated_delta_rule_last_state(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One document: its output and the state [HV, K, V] after its last token, from which generation goes on."""
    out, state = _chunked(q, k, v, g, beta, torch.tensor([0, q.shape[0]], dtype=torch.int32))
    return out, state[0]


def gated_delta_rule_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One more token (T = 1) of a document whose state is `state` [HV, K, V]: its output and the new state."""
    return _token(*_prepared(q, k, v, g, beta), 0, state, q.dtype)
