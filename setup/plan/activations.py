"""What one training step of the native engine holds on a GPU, tensor by tensor: pure arithmetic.

Read off what each autograd.Function in kernels/*/function.py saves and what each backward allocates while it runs; the
tests hold it to a trace of the real engine (lab/memory_trace.py). A step's peak is the largest of

    the head, forward       all kept + hidden [T, H] + gathered [S, H] + its gradient fp32 + a block of logits
                            (full: + the head's gradient fp32 [V, H], and a second one where there are several blocks)
    the head, backward      all kept + gradient fp32 [S, H] + gradient [T, H] (full: + [V, H] in fp32 and in bf16)
    each layer, backward    kept of the layers before it + the moments of `_gdn`, `_attention`, `_mlp` below
    the optimiser           weights, masters, gradients, moments

Legend: T tokens of the micro-batch, S supervised rows, H hidden, I ffn, N columns of a grouped product, r rank,
G adapted projections of a group, e bytes of the compute type (2: the fused kernels' type).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sparktune.setup.plan.schema import ModelSpec

__all__ = ["Step", "StepBytes", "allocated", "step_bytes"]

E = 2
FP32 = 4
_CHUNK = 64
"""Tokens a chunk of the delta rule (kernels/gated_delta_rule/function.py, CHUNK)."""
LOGITS_BYTES = 2**30
"""Room for one block of logits (kernels/linear_cross_entropy/function.py)."""
_MIB = 2**20


def allocated(size: int) -> int:
    """Returns what PyTorch's CUDA allocator counts for a tensor of `size` bytes.

    Blocks are multiples of 512 bytes. From 10 MiB on a tensor gets a segment of its own, a multiple of 2 MiB, whose
    rest stays with the tensor if it is at most 1 MiB (c10/cuda/CUDACachingAllocator: should_split).
    """
    size = -(-size // 512) * 512
    if size < 10 * _MIB:
        return size
    segment = -(-size // (2 * _MIB)) * (2 * _MIB)
    return segment if segment - size <= _MIB else size


def _sum(tensors: Iterable[int]) -> int:
    return sum(map(allocated, tensors))


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides the memory of a step, beside the model."""

    tokens: int
    supervised: int
    """Supervised rows of the micro-batch."""
    full: bool
    """Full fine-tuning rather than LoRA."""
    rank: int
    """0 in full fine-tuning."""
    targets: frozenset[str]
    """Adapted projections."""
    dropout: bool
    """A mask of the adapters' input is kept."""
    gradients_accumulate: bool
    """More than one micro-batch a step: in the last one's backward all gradients exist already."""
    split_heads: bool
    """Attention's dk and dv are summed from one fp32 part a query head (Hopper's configuration)."""
    widened: float = 0.0
    """Of a group's matrix in the compute type, what is made for each product over a base stored in fewer bits: 0, or 1,
    and 1/32 more for NF4's scales, where those are stored in eight bits (kernels/frozen_weight.py)."""
    spare_chunks: int = 0
    """Chunks of the delta rule that a graph's tables leave room for (training/graphs.py)."""


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """The memory of a step beside weights, masters and moments."""

    kept: int
    """Activations from forward to backward."""
    gradients: int
    """fp32 gradients of everything that learns."""
    peak: int
    """The most there is at once, gradients that exist then included."""
    graphed: int
    """What the same step needs of the device when the tower replays as CUDA graphs (training/graphs.py)."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer. Sizes are tensors' bytes."""

    kept: int
    """From its forward to its backward, nothing recomputed."""
    again: int
    """Of those, what the policy `norms` computes again."""
    moments: tuple[int, ...]
    """What there is of this layer at the moments of its backward, nothing recomputed; kept tensors included."""
    moments_norms: tuple[int, ...]
    """The same under the policy `norms`."""
    gradients: int
    """fp32 gradients of what learns in it."""


@dataclass(frozen=True)
class _Group:
    """A grouped projection."""

    width_in: int
    widths: dict[str, int]

    @property
    def columns(self) -> int:
        return sum(self.widths.values())


class _Builder:
    """Collects the tensors of one layer: what its forward keeps, then what each moment of its backward adds."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._kept: dict[str, list[int]] = {}
        self._again: set[str] = set()
        self._freed: set[str] = set()
        self._moments: dict[bool, list[int]] = {False: [], True: []}
        self.gradients = 0

    def keep(self, name: str, *sizes: int, again: bool = False) -> None:
        """Tensors from forward to backward; `again`: a norm's or activation's output."""
        self._kept[name] = list(sizes)
        if again:
            self._again.add(name)

    def keep_adapter(self, name: str, group: _Group) -> None:
        """What a projection group's product keeps beside its input: compute copies of A and B, x A^T, the mask."""
        s, (adapted, out) = self.step, self._adapted(group)
        if s.full:
            self.gradients += FP32 * group.columns * group.width_in
            return
        if adapted:
            mask = [s.tokens * group.width_in * E] if s.dropout else []
            self.keep(name, adapted * s.rank * group.width_in * E, out * s.rank * E, s.tokens * adapted * s.rank * E,
                      *mask)
            self.gradients += FP32 * s.rank * (adapted * group.width_in + out)

    def _adapted(self, group: _Group) -> tuple[int, int]:
        widths = [n for name, n in group.widths.items() if name in self.step.targets]
        return len(widths), sum(widths)

    def product(self, group: _Group, source: str, *extra: int) -> None:
        """The backward of a product: its input (computed again under `norms`), dx, and the weights' gradients."""
        s, (adapted, out) = self.step, self._adapted(group)
        tensors = [s.tokens * group.width_in * E, *extra]
        if s.full:
            tensors.append(group.columns * group.width_in * E)
        elif adapted:
            tensors.append(s.tokens * adapted * s.rank * E)
        if s.widened:  # given back before the weights' gradients are made
            self.moment(*tensors, int(group.columns * group.width_in * E * s.widened), needs=(source,))
        if adapted and not s.full:
            tensors += [FP32 * adapted * s.rank * group.width_in, FP32 * out * s.rank]
        self.moment(*tensors, needs=(source,))

    def moment(self, *sizes: int, needs: Sequence[str] = ()) -> None:
        """Adds tensors to what is still kept; `needs` are read by this moment, so made again where they are not."""
        for norms in (False, True):
            left = [n for name, sizes_ in self._kept.items() for n in sizes_
                    if name not in self._freed and (not norms or name not in self._again or name in needs)]
            self._moments[norms].append(_sum(left) + _sum(sizes))

    def free(self, *names: str) -> None:
        """Kept tensors that the backward has used up."""
        self._freed.update(names)

    def done(self) -> _Layer:
        """Returns the layer."""
        again = _sum(n for name in self._again for n in self._kept[name])
        return _Layer(
            kept=_sum(n for sizes in self._kept.values() for n in sizes), again=again,
            moments=tuple(self._moments[False]), moments_norms=tuple(self._moments[True]), gradients=self.gradients,
        )


def _layer(spec: ModelSpec, kind: str, step: Step) -> _Layer:
    """Returns a layer: norm, mixer, norm, MLP forward; the reverse backward. `stream` is the residual's gradient."""
    T, H, ffn = step.tokens, spec.hidden_size, spec.intermediate_size
    stream = T * H * E
    b = _Builder(step)
    b.keep("h_in", T * H * E, T * FP32)
    b.keep("x_in", T * H * E, again=True)
    mixer_backward = (_gdn if kind == "linear_attention" else _attention)(b, spec, step)
    b.keep("h_mid", T * H * E, T * FP32)
    b.keep("x_mid", T * H * E, again=True)
    gate_up = _Group(H, {"gate_proj": ffn, "up_proj": ffn})
    down = _Group(ffn, {"down_proj": H})
    b.keep("gate_up", T * 2 * ffn * E)
    b.keep("act", T * ffn * E, again=True)
    b.keep_adapter("gate_up_lora", gate_up)
    b.keep_adapter("down_lora", down)
    # backward
    b.product(down, "act", stream)
    b.free("act", "down_lora")
    b.moment(stream, T * ffn * E, T * 2 * ffn * E)  # d(silu * up), d(gate | up)
    b.free("gate_up")
    b.product(gate_up, "x_mid", stream, T * 2 * ffn * E)
    b.free("x_mid", "gate_up_lora")
    b.moment(stream, stream, stream)
    b.free("h_mid")
    mixer_backward()
    b.free("x_in")
    b.moment(stream, stream, stream)
    return b.done()


def _gdn(b: _Builder, spec: ModelSpec, step: Step) -> Callable[[], None]:
    """Keeps a GDN mixer's tensors; returns its backward."""
    T, HK, HV, K, V = step.tokens, spec.gdn_key_heads, spec.gdn_value_heads, spec.gdn_key_dim, spec.gdn_value_dim
    channels, values = 2 * HK * K + HV * V, HV * V
    chunks = -(-T // _CHUNK) + step.spare_chunks
    projections = _Group(spec.hidden_size, {
        "in_proj_qkv": channels, "in_proj_z": values, "in_proj_b": HV, "in_proj_a": HV,
    })
    out = _Group(values, {"out_proj": spec.hidden_size})
    product = T * projections.columns * E
    b.keep("product", product)  # qkv | z | b | a
    b.keep("qkv", T * HK * K * E, T * HK * K * E, T * values * E)
    b.keep("rule", T * HV * FP32, T * HV * FP32, 2 * T * HK * FP32, chunks * HV * _CHUNK**2 * E)
    b.keep("o", T * values * E)
    b.keep("normed", T * values * E, again=True)
    b.keep_adapter("in_lora", projections)
    b.keep_adapter("out_lora", out)
    states = chunks * HV * K * V * E
    rule = [T * HV * K * E, T * values * E, states, T * values * E, states, 2 * T * HK * K * E, T * values * E,
            2 * T * HV * FP32, T * HV * K * E, chunks * HV * _CHUNK**2 * E]  # w, n, S, dn, dS, dqk, dv, dg|dbeta, x, e
    if HV > HK:
        rule.append(2 * T * HV * K * FP32)  # one part a value head

    def backward() -> None:
        stream = T * spec.hidden_size * E
        b.product(out, "normed", stream)
        b.free("normed", "out_lora")
        b.moment(stream, T * values * E, T * values * E, product)
        b.free("o")
        b.moment(stream, T * values * E, product, *rule)
        b.free("qkv", "rule", "product")
        b.product(projections, "x_in", stream, product)
        b.free("in_lora")

    return backward


def _attention(b: _Builder, spec: ModelSpec, step: Step) -> Callable[[], None]:
    """Keeps an attention mixer's tensors; returns its backward."""
    T, q, kv = step.tokens, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    gated = spec.attention_gate
    projections = _Group(spec.hidden_size, {"q_proj": q * (2 if gated else 1), "k_proj": kv, "v_proj": kv})
    out = _Group(q, {"o_proj": spec.hidden_size})
    product = T * projections.columns * E
    b.keep("product", product)
    b.keep("qk", T * q * E, T * kv * E)
    b.keep("o", T * q * E)
    b.keep("lse", T * spec.num_heads * FP32)
    if gated:
        b.keep("gated", T * q * E, again=True)
    b.keep_adapter("in_lora", projections)
    b.keep_adapter("out_lora", out)
    rule = [T * spec.num_heads * FP32, T * q * E, 2 * T * kv * E]  # delta, dq, dk|dv
    if step.split_heads and spec.num_heads > spec.num_kv_heads:
        rule.append(2 * T * q * FP32)

    def backward() -> None:
        stream, dgate = T * spec.hidden_size * E, [T * q * E] if gated else []
        b.product(out, "gated" if gated else "o", stream)
        b.free("gated", "out_lora")
        if gated:
            b.moment(stream, T * q * E, T * q * E, *dgate)
        b.moment(stream, T * q * E, *dgate, *rule)
        b.free("qk", "o", "lse")
        b.moment(stream, T * q * E, 2 * T * kv * E, *dgate, product)
        b.free("product")
        b.product(projections, "x_in", stream, product)
        b.free("in_lora")

    return backward


def _chunk_rows(vocabulary: int, n_rows: int) -> int:
    """Rows of a block of logits, as kernels/linear_cross_entropy/function.py chooses them."""
    most = max(LOGITS_BYTES // (vocabulary * E) // 64 * 64, 64)
    blocks = -(-n_rows // most)
    return min(most, -(-n_rows // blocks + 63) // 64 * 64) if blocks > 1 else n_rows


def _head(spec: ModelSpec, step: Step) -> tuple[int, int]:
    """Returns what the head adds to everything kept, in its forward and in its backward."""
    T, S, H, V = step.tokens, step.supervised, spec.hidden_size, spec.vocab_size
    block = _chunk_rows(V, S) if S else 0
    final = [T * H * E, T * FP32]  # the last norm's input
    gradient = S * H * FP32
    weight = [V * H * FP32] if step.full else []
    parts = weight * (2 if block < S else 1)
    forward = [*final, T * H * E, S * H * E, gradient, block * V * E, *parts]
    rounded = [V * H * E] if step.full else []
    backward = [*final, T * H * E, gradient, *weight, *rounded]
    return _sum(forward), _sum(backward)


def _held_inputs(spec: ModelSpec, policy: str, layer: int) -> int:
    """Returns how many residual streams [T, H] policies `layer` and `all` hold in the backward of a layer."""
    if policy == "layer":
        return layer + 1
    group = math.isqrt(spec.num_layers - 1) + 1
    return layer // group + 1 + layer % group


def step_bytes(spec: ModelSpec, policy: str, step: Step, whole_layers: int | None = None) -> StepBytes:
    """Returns what a step holds beside weights, masters and moments.

    Gradients belong to the peak, since they may or may not exist when the activations are at their highest.

    Args:
        spec: the model.
        policy: none, norms, layer or all.
        step: the micro-batch and the method.
        whole_layers: under `layer`, how many of the first layers are computed again whole, the others as `norms` does;
            all of them when left out.
    """
    whole = {"layer": spec.num_layers if whole_layers is None else whole_layers, "all": spec.num_layers}.get(policy, 0)
    kinds = {kind: _layer(spec, kind, step) for kind in dict.fromkeys(spec.layer_types)}
    layers = [kinds[kind] for kind in spec.layer_types]
    # A document's last chunk may be short; a graph has room for a document every 256 tokens.
    roomy = replace(step, spare_chunks=max(step.tokens // 256, 8))
    wider = _layer(spec, "linear_attention", roomy).kept - kinds["linear_attention"].kept \
        if "linear_attention" in kinds else 0
    stream = allocated(step.tokens * spec.hidden_size * E)
    gradients = sum(layer.gradients for layer in layers)
    head_gradient = FP32 * spec.vocab_size * spec.hidden_size if step.full else 0
    tied = allocated(spec.vocab_size * spec.hidden_size * E) if step.full and spec.tie_word_embeddings else 0
    # cos, sin and each token's position; the supervised rows and their targets
    row = _sum([step.tokens * spec.rope_dim * FP32] * 2 + [step.tokens * FP32]) + 2 * step.supervised * 8
    kept_of = [stream if i < whole else layer.kept - (layer.again if policy != "none" else 0)
               for i, layer in enumerate(layers)]
    kept_all = sum(kept_of)
    if policy == "all":
        kept_all = stream * math.ceil(spec.num_layers / (math.isqrt(spec.num_layers - 1) + 1))
    everything = gradients + head_gradient * (1 if spec.tie_word_embeddings else 2)
    before = everything if step.gradients_accumulate else 0
    head_forward, head_backward = _head(spec, step)
    graphed = 0
    moments = [kept_all + head_forward + before, kept_all + head_backward + before, everything]
    later = 0 if spec.tie_word_embeddings else head_gradient
    below = kept_all
    for i in reversed(range(spec.num_layers)):
        layer = layers[i]
        later += layer.gradients
        if i >= whole:
            below -= kept_of[i]
            most = max(layer.moments if policy == "none" else layer.moments_norms) + below
        else:
            # its own input is the kept stream, so it is not a tensor of the layer's recomputation
            most = max(layer.moments) - stream + stream * _held_inputs(spec, policy, i)
        moments.append(most + tied + (before or later))
        # A graph adds a layer's gradients to their sums when it has all of them, and between two blocks that are not
        # computed again it keeps the first one's output beside the sum that the second one keeps (training/stages.py).
        passed = stream * max(i + 1 - whole, 0)
        graphed = max(graphed, most + passed + everything + layer.gradients // (2 if step.full else 1))
    if step.full:
        # The embedding's gradient comes last; tied, it meets the head's and both become a third.
        copies = 3 if spec.tie_word_embeddings and step.gradients_accumulate else 1
        moments.append(everything + copies * allocated(spec.vocab_size * spec.hidden_size * E) + stream)
    # A graph's pool is its own, so the head finds no room in it; embeddings, hidden states and both their gradients
    # stay for good. Nothing is wider for a layer that is computed again and given up.
    wide_layers = spec.layer_types[whole:].count("linear_attention") + min(whole, 1)
    graphed += max(head_forward, head_backward) + (4 if step.full else 3) * stream + wider * wide_layers
    return StepBytes(
        kept=kept_all, gradients=everything, peak=max(moments) + row, graphed=max(graphed, *moments) + row
    )
