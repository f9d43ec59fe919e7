"""One case for every fused op: inputs, the fused function and its reference. Tests and the GPU check share them.

Shapes are odd on purpose: row counts that no tile divides, strided inputs, documents of one token, zero rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sparktune.kernels.attention_prologue.function import attention_prologue_fused
from sparktune.kernels.attention_prologue.reference import attention_prologue_reference
from sparktune.kernels.causal_conv1d.function import causal_conv1d_fused
from sparktune.kernels.causal_conv1d.reference import causal_conv1d_reference
from sparktune.kernels.columns import split_columns
from sparktune.kernels.gated_delta_rule.gates import gdn_gates_fused
from sparktune.kernels.gated_delta_rule.reference import gdn_gates_reference
from sparktune.kernels.gated_rms_norm.function import gated_rms_norm_fused
from sparktune.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from sparktune.kernels.linear_cross_entropy.function import linear_cross_entropy_fused
from sparktune.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from sparktune.kernels.lora_linear.function import lora_linear_fused
from sparktune.kernels.lora_linear.reference import lora_linear_reference
from sparktune.kernels.rms_norm.function import add_rms_norm_fused, rms_norm_fused
from sparktune.kernels.rms_norm.reference import add_rms_norm_reference, rms_norm_reference
from sparktune.kernels.sigmoid_gate.function import sigmoid_gate_fused
from sparktune.kernels.sigmoid_gate.reference import sigmoid_gate_reference
from sparktune.kernels.silu_mul.function import silu_mul_fused
from sparktune.kernels.silu_mul.reference import silu_mul_reference

__all__ = ["CASES", "Case", "Errors", "errors_of"]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op on one set of shapes."""

    name: str
    make: Callable[[torch.Generator], Tensors]
    """Inputs in fp32 on the CPU; integers and names in `keep` are not rounded to the compute type."""
    tri: Callable[[Tensors], tuple[torch.Tensor | None, ...]]
    ref: Callable[[Tensors], tuple[torch.Tensor | None, ...]]
    grads: tuple[str, ...]
    """Inputs whose gradients are compared."""
    keep: tuple[str, ...] = field(default=())
    """Inputs that stay fp32 whatever the compute type (fp64 for the truth)."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Squared error and largest error against fp64 truth, of the fused op and of the same-dtype reference."""

    tri_square: float
    ref_square: float
    tri_max: float
    ref_max: float
    truth_rms: float
    truth_max: float


def _normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=g) * scale


def _cu(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _prepare(case: Case, inputs: Tensors, dtype: torch.dtype, device: torch.device) -> Tensors:
    out = {}
    for name, t in inputs.items():
        if t.is_floating_point():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            t = t.to(wide if name in case.keep else dtype)
        # a host copy of the boundaries is what the contract asks for
        t = t if name == "cu_seqlens_cpu" else t.to(device)
        out[name] = t.detach().clone().requires_grad_(name in case.grads)
    return out


def _run(
    call: Callable[[Tensors], tuple[torch.Tensor | None, ...]], inputs: Tensors, cotangents: list[torch.Tensor] | None,
    grads: Sequence[str],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns outputs followed by gradients, and the cotangents' fp64 seeds (made here if not given)."""
    outs = [o for o in call(inputs) if o is not None]
    if cotangents is None:
        g = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outs]
    seeds = [c.to(o.device, o.dtype) for c, o in zip(cotangents, outs, strict=True)]
    got = torch.autograd.grad(outs, [inputs[n] for n in grads], seeds)
    return [*[o.detach() for o in outs], *got], cotangents


def errors_of(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Errors]:
    """Runs truth (fp64), reference and fused op on one seed.

    Returns:
        Errors by output ("out0", ...) and by gradient ("d_x", ...).
    """
    raw = case.make(torch.Generator().manual_seed(seed))
    raw = {n: t.to(dtype).float() if t.is_floating_point() and n not in case.keep else t for n, t in raw.items()}
    truth, cotangents = _run(case.ref, _prepare(case, raw, torch.float64, device), None, case.grads)
    cotangents = [c.to(dtype).double() for c in cotangents]
    truth, _ = _run(case.ref, _prepare(case, raw, torch.float64, device), cotangents, case.grads)
    ref, _ = _run(case.ref, _prepare(case, raw, dtype, device), cotangents, case.grads)
    tri, _ = _run(case.tri, _prepare(case, raw, dtype, device), cotangents, case.grads)
    names = [f"out{i}" for i in range(len(truth) - len(case.grads))] + [f"d_{n}" for n in case.grads]
    result = {}
    for name, exact, r, t in zip(names, truth, ref, tri, strict=True):
        if t.dtype != r.dtype or t.shape != r.shape:
            raise AssertionError(
                f"{case.name} {name}: {tuple(t.shape)} {t.dtype}, reference {tuple(r.shape)} {r.dtype}"
            )
        e_t, e_r = (t.double() - exact).abs(), (r.double() - exact).abs()
        if exact.numel() == 0:
            continue
        # a NaN must fail, and max() of Python would lose it
        result[name] = Errors(
            tri_square=e_t.square().mean().item(), ref_square=e_r.square().mean().item(), tri_max=e_t.max().item(),
            ref_max=e_r.max().item(), truth_rms=exact.square().mean().sqrt().item(), truth_max=exact.abs().max().item(),
        )
    return result


def _norm_case(rows: int, width: int, zero_centred: bool, add: bool, strided: bool) -> Case:
    def make(g: torch.Generator) -> Tensors:
        x = _normal(g, rows, width + 16 * strided)
        tensors = {"x": x, "weight": _normal(g, width, scale=0.3)}
        if add:
            tensors["residual"] = _normal(g, rows, width)
        return tensors

    def x_of(t: Tensors) -> torch.Tensor:
        return t["x"][:, :width]

    if add:
        return Case(
            name=f"add_rms_norm_{rows}x{width}{'_z' if zero_centred else ''}{'_strided' if strided else ''}",
            make=make, grads=("x", "residual", "weight"),
            tri=lambda t: add_rms_norm_fused(x_of(t), t["residual"], t["weight"], 1e-6, zero_centred=zero_centred),
            ref=lambda t: add_rms_norm_reference(x_of(t), t["residual"], t["weight"], 1e-6, zero_centred=zero_centred),
        )
    return Case(
        name=f"rms_norm_{rows}x{width}{'_z' if zero_centred else ''}{'_strided' if strided else ''}", make=make,
        grads=("x", "weight"),
        tri=lambda t: (rms_norm_fused(x_of(t), t["weight"], 1e-6, zero_centred=zero_centred),),
        ref=lambda t: (rms_norm_reference(x_of(t), t["weight"], 1e-6, zero_centred=zero_centred),),
    )


def _gated_norm_case(T: int, HV: int, V: int) -> Case:
    def z_of(t: Tensors) -> torch.Tensor:
        return t["zz"][:, 8:].unflatten(1, (HV, V))

    return Case(
        name=f"gated_rms_norm_{T}x{HV}x{V}", grads=("x", "zz", "weight"),
        make=lambda g: {
            "x": _normal(g, T, HV, V), "zz": _normal(g, T, HV * V + 8, scale=2.0),
            "weight": 1 + _normal(g, V, scale=0.2),
        },
        tri=lambda t: (gated_rms_norm_fused(t["x"], z_of(t), t["weight"], 1e-6),),
        ref=lambda t: (gated_rms_norm_reference(t["x"], z_of(t), t["weight"], 1e-6),),
    )


def _silu_case(T: int, inner: int) -> Case:
    def split(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return t["gu"][:, :inner], t["gu"][:, inner:]

    return Case(
        name=f"silu_mul_{T}x{inner}", grads=("gu",), make=lambda g: {"gu": _normal(g, T, 2 * inner, scale=2.0)},
        tri=lambda t: (silu_mul_fused(*split(t)),), ref=lambda t: (silu_mul_reference(*split(t)),),
    )


def _sigmoid_case(T: int, heads: int, D: int) -> Case:
    def gate_of(t: Tensors) -> torch.Tensor:
        return t["q"].unflatten(1, (heads, 2 * D))[..., D:]

    return Case(
        name=f"sigmoid_gate_{T}x{heads}x{D}", grads=("x", "q"),
        make=lambda g: {"x": _normal(g, T, heads, D), "q": _normal(g, T, heads * 2 * D, scale=2.0)},
        tri=lambda t: (sigmoid_gate_fused(t["x"], gate_of(t)),),
        ref=lambda t: (sigmoid_gate_reference(t["x"], gate_of(t)),),
    )


def _angles(T: int, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(T)[:, None] * (1e4 ** (-torch.arange(R // 2) / (R // 2)))[None]
    angle = torch.cat((angle, angle), 1)
    return angle.cos(), angle.sin()


def _prologue_case(
    T: int, heads: int, kv: int, D: int, R: int, gated: bool, norm: bool, zero_centred: bool
) -> Case:
    q_width = heads * D * (2 if gated else 1)

    def make(g: torch.Generator) -> Tensors:
        cos, sin = _angles(T, R)
        tensors = {"qkv": _normal(g, T, q_width + 2 * kv * D), "cos": cos, "sin": sin}
        if norm:
            tensors |= {"qw": _normal(g, D, scale=0.3), "kw": _normal(g, D, scale=0.3)}
        return tensors

    def parts(t: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = t["qkv"].split((q_width, kv * D, kv * D), 1)
        return q.unflatten(1, (heads, -1)), k.unflatten(1, (kv, D)), v.unflatten(1, (kv, D))

    def call(op: Callable[..., tuple[torch.Tensor | None, ...]], t: Tensors) -> tuple[torch.Tensor | None, ...]:
        q, k, v = parts(t)
        q, k, gate = op(
            q, k, t.get("qw"), t.get("kw"), t["cos"], t["sin"], 1e-6, zero_centred=zero_centred, gated=gated
        )
        return q, k, v, gate

    tags = [n for n, on in (("gated", gated), ("norm", norm), ("z", zero_centred)) if on]
    return Case(
        name="_".join([f"attention_prologue_{T}x{heads}x{kv}x{D}r{R}", *tags]), make=make,
        grads=("qkv", "qw", "kw") if norm else ("qkv",), keep=("cos", "sin"),
        tri=lambda t: call(attention_prologue_fused, t),
        ref=lambda t: call(attention_prologue_reference, t),
    )


def _conv_case(lengths: Sequence[int], C: int, W: int) -> Case:
    def make(g: torch.Generator) -> Tensors:
        cu = _cu(lengths)
        return {"xx": _normal(g, sum(lengths), C + 8), "weight": _normal(g, C, W, scale=0.5), "cu_seqlens": cu,
                "cu_seqlens_cpu": cu}

    def call(op: Callable[..., torch.Tensor], t: Tensors) -> tuple[torch.Tensor]:
        return (op(t["xx"][:, :C], t["weight"], t["cu_seqlens"], t["cu_seqlens_cpu"]),)

    return Case(
        name=f"causal_conv1d_{sum(lengths)}x{C}w{W}n{len(lengths)}", make=make, grads=("xx", "weight"),
        tri=lambda t: call(causal_conv1d_fused, t), ref=lambda t: call(causal_conv1d_reference, t),
    )


def _gates_case(T: int, HV: int) -> Case:
    def call(op: Callable[..., tuple[torch.Tensor, torch.Tensor]], t: Tensors) -> tuple[torch.Tensor, ...]:
        b, a = t["ba"].split((HV, HV), 1)
        return op(a, b, t["A_log"], t["dt_bias"])

    return Case(
        name=f"gdn_gates_{T}x{HV}", grads=("ba", "A_log", "dt_bias"), keep=("A_log",),
        make=lambda g: {
            "ba": _normal(g, T, 2 * HV, scale=4.0), "A_log": _normal(g, HV, scale=0.5), "dt_bias": _normal(g, HV)
        },
        tri=lambda t: call(gdn_gates_fused, t), ref=lambda t: call(gdn_gates_reference, t),
    )


def _loss_case(T: int, H: int, V: int, S: int) -> Case:
    def make(g: torch.Generator) -> Tensors:
        return {
            "hidden": _normal(g, T, H), "weight": _normal(g, V, H, scale=2 * H**-0.5),
            "rows": torch.randperm(T, generator=g)[:S].sort().values,
            "targets": torch.randint(0, V, (S,), generator=g),
        }

    def call(op: Callable[..., torch.Tensor], t: Tensors) -> tuple[torch.Tensor]:
        return (op(t["hidden"], t["weight"], t["rows"], t["targets"]),)

    return Case(
        name=f"linear_cross_entropy_{T}x{H}x{V}s{S}", make=make, grads=("hidden", "weight"),
        tri=lambda t: call(linear_cross_entropy_fused, t), ref=lambda t: call(linear_cross_entropy_reference, t),
    )


def _lora_case(T: int, width: int, sizes: Sequence[int], adapted: int, r: int, scale: float, dropout: bool) -> Case:
    def make(g: torch.Generator) -> Tensors:
        tensors = {
            "x": _normal(g, T, width), "weight": _normal(g, sum(sizes), width, scale=width**-0.5),
            "bias": _normal(g, sum(sizes)), "a": _normal(g, adapted * r, width, scale=width**-0.5),
            "b": _normal(g, sum(sizes[:adapted]), r, scale=r**-0.5),
        }
        if dropout:
            tensors["mask"] = (torch.rand(T, width, generator=g) > 0.25).float() * 1.25
        return tensors

    def call(op: Callable[..., torch.Tensor], t: Tensors) -> tuple[torch.Tensor]:
        return (op(t["x"], t["weight"], t["bias"], t["a"], t["b"], sizes[:adapted], scale, t.get("mask")),)

    return Case(
        name=f"lora_linear_{T}x{width}_{'_'.join(map(str, sizes))}_r{r}{'_dropout' if dropout else ''}", make=make,
        grads=("x", "a", "b", "bias"), keep=("a", "b"),
        tri=lambda t: call(lora_linear_fused, t), ref=lambda t: call(lora_linear_reference, t),
    )


def _plain_split(x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return x.split(list(sizes), dim=-1)


def _grouped_gdn_case(lengths: Sequence[int], heads: int, dim: int) -> Case:
    """The GDN's product split into q|k|v, z, b, a with all four consumers: gradients must meet in one tensor."""
    T, inner = sum(lengths), heads * dim
    sizes = (3 * inner, inner, heads, heads)

    def make(g: torch.Generator) -> Tensors:
        cu = _cu(lengths)
        return {
            "product": _normal(g, T, sum(sizes)), "conv": _normal(g, 3 * inner, 4, scale=0.5),
            "o": _normal(g, T, inner), "norm": _normal(g, dim), "A_log": _normal(g, heads),
            "dt_bias": _normal(g, heads), "cu_seqlens": cu, "cu_seqlens_cpu": cu,
        }

    def call(t: Tensors, tri: bool) -> tuple[torch.Tensor, ...]:
        qkv, z, b, a = (split_columns if tri else _plain_split)(t["product"], sizes)
        cu = t["cu_seqlens"], t["cu_seqlens_cpu"]
        if tri:
            q, k, v = causal_conv1d_fused(qkv, t["conv"], *cu, split=(inner, inner, inner))
        else:
            q, k, v = causal_conv1d_reference(qkv, t["conv"], *cu).split(inner, -1)
        g, beta = (gdn_gates_fused if tri else gdn_gates_reference)(a, b, t["A_log"], t["dt_bias"])
        o, z = t["o"].unflatten(-1, (heads, dim)), z.unflatten(-1, (heads, dim))
        return q, k, v, g, beta, (gated_rms_norm_fused if tri else gated_rms_norm_reference)(o, z, t["norm"], 1e-6)

    return Case(
        name=f"grouped_gdn_{T}x{heads}x{dim}", make=make, grads=("product", "o"), keep=("A_log",),
        tri=lambda t: call(t, True), ref=lambda t: call(t, False),
    )


def _grouped_attention_case(T: int, heads: int, kv: int, D: int) -> Case:
    sizes = (2 * heads * D, kv * D, kv * D)

    def make(g: torch.Generator) -> Tensors:
        cos, sin = _angles(T, D // 2)
        return {"product": _normal(g, T, sum(sizes)), "w": _normal(g, D, scale=0.3), "cos": cos, "sin": sin}

    def call(t: Tensors, tri: bool) -> tuple[torch.Tensor | None, ...]:
        q, k, v = (split_columns if tri else _plain_split)(t["product"], sizes)
        op = attention_prologue_fused if tri else attention_prologue_reference
        q, k, gate = op(
            q.unflatten(-1, (heads, -1)), k.unflatten(-1, (kv, -1)), t["w"], t["w"], t["cos"], t["sin"], 1e-6,
            zero_centred=True, gated=True,
        )
        return q, k, gate, 2 * v

    return Case(
        name=f"grouped_attention_{T}x{heads}x{kv}x{D}", make=make, grads=("product",), keep=("cos", "sin"),
        tri=lambda t: call(t, True), ref=lambda t: call(t, False),
    )


def _grouped_mlp_case(T: int, inner: int, two_consumers: bool) -> Case:
    def call(t: Tensors, tri: bool) -> tuple[torch.Tensor, ...]:
        gate, up = (split_columns if tri else _plain_split)(t["product"], (inner, inner))
        op = silu_mul_fused if tri else silu_mul_reference
        # the same parts twice: their gradients must be summed, not written over each other
        return (op(gate, up), op(gate, up)) if two_consumers else (op(gate, up),)

    return Case(
        name=f"grouped_mlp_{T}x{inner}{'_twice' if two_consumers else ''}", grads=("product",),
        make=lambda g: {"product": _normal(g, T, 2 * inner)},
        tri=lambda t: call(t, True), ref=lambda t: call(t, False),
    )


CASES: tuple[Case, ...] = (
    _norm_case(37, 256, True, False, False),
    _norm_case(5, 80, False, False, True),
    _norm_case(0, 64, True, False, False),
    _norm_case(23, 320, True, True, True),
    _norm_case(21, 64, False, True, False),
    _gated_norm_case(19, 3, 32),
    _gated_norm_case(7, 2, 24),
    _gated_norm_case(0, 2, 32),
    _silu_case(13, 96),
    _silu_case(6, 1032),
    _silu_case(0, 32),
    _sigmoid_case(11, 3, 24),
    _prologue_case(19, 4, 2, 32, 8, True, True, True),
    _prologue_case(9, 3, 1, 24, 24, False, True, False),
    _prologue_case(9, 2, 2, 16, 16, False, False, False),
    _conv_case((70,), 40, 4),
    _conv_case((1, 2, 3, 31, 1, 40, 1, 1), 24, 4),
    _conv_case((5, 29), 16, 2),
    _gates_case(67, 6),
    _loss_case(29, 32, 300, 11),
    _loss_case(29, 32, 300, 0),
    _lora_case(23, 32, (24, 16, 8), 2, 8, 0.5, False),
    _lora_case(23, 32, (24, 16), 2, 4, 2.0, True),
    _lora_case(9, 16, (24,), 1, 4, 1.0, False),
    _grouped_gdn_case((3, 1, 19), 2, 16),
    _grouped_attention_case(13, 2, 1, 16),
    _grouped_mlp_case(9, 24, False),
    _grouped_mlp_case(9, 24, True),
)
