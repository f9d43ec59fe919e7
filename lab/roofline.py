"""ESTIMATE of a training step on GB10 from its arithmetic and its bytes, set against what an H200 measured.

usage: python -m lab.roofline [--size 2B] [--tokens 5376] [--rank 128] [--supervised 0.35] [--busy-ms MS] [--csv FILE]
       python -m lab.roofline --measured docs/results/side_by_side.csv [--size 2B] [--csv FILE]

Every launch of the native engine's LoRA step (one micro-batch, nothing recomputed) is listed with its FLOP and the
bytes of the tensors that it reads and writes once. A chip needs at least max(FLOP / its products, bytes / its memory)
for each; their sum is the floor. `--busy-ms`, the GPU-busy time of that micro-batch measured on an H200
(lab/profile.py; `--measured` takes the last native row of this size from a CSV of it or of lab/side_by_side.py), gives
the share of the floor that our kernels reach there; the estimate for GB10 assumes the same share. Nothing of it is
measured on a GB10: the first hour on one (lab/gb10_first_hour.sh) replaces it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from sparktune.lab.table import append_rows
from sparktune.setup.plan.models import CATALOGUE, spec_from_config
from sparktune.setup.plan.schema import ModelSpec

__all__ = ["CHIPS", "Chip", "Launch", "floor_ms", "projection", "step_launches"]

E = 2
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What a chip reaches at best."""

    tflop_per_s: float
    """Dense bf16 products."""
    tb_per_s: float
    """Device memory, a copy's reads and writes."""
    source: str


CHIPS = {
    "H200": Chip(tflop_per_s=790, tb_per_s=4.25, source="measured: a bf16 product, a copy"),
    "GB10 low": Chip(tflop_per_s=100, tb_per_s=0.273, source="published: lower end of its dense bf16 rate"),
    "GB10 high": Chip(tflop_per_s=125, tb_per_s=0.273, source="published: upper end of its dense bf16 rate"),
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kind of launch, `count` times a micro-batch."""

    name: str
    flop: float
    bytes: float
    count: int

    def ms(self, chip: Chip) -> float:
        """Returns the least time of all of them, in milliseconds."""
        return self.count * max(self.flop / chip.tflop_per_s / 1e9, self.bytes / chip.tb_per_s / 1e9)


def _product(name: str, m: int, n: int, k: int, count: int, *, adds: bool = False, wide: bool = False) -> Launch:
    """[m, k] x [k, n]; `adds`: onto what is there; `wide`: written in fp32."""
    written = m * n * (FP32 if wide else E)
    return Launch(
        name=name, flop=2.0 * m * n * k, bytes=float((m * k + k * n) * E + written * (2 if adds else 1)), count=count
    )


def _lora(name: str, T: int, width: int, out: int, parts: list[int], rank: int, count: int) -> list[Launch]:
    """A grouped LoRA projection, forward and backward: kernels/lora_linear/function.py, product by product."""
    launches = [
        _product(f"{name}: x W", T, out, width, count), _product(f"{name}: dy W", T, width, out, count),
        _product(f"{name}: x A", T, len(parts) * rank, width, count),
        _product(f"{name}: dxa A", T, width, len(parts) * rank, count, adds=True),
        _product(f"{name}: dA", len(parts) * rank, width, T, count, wide=True),
    ]
    for size in parts:
        launches += [
            _product(f"{name}: xa B", T, size, rank, count, adds=True),
            _product(f"{name}: dy B", T, rank, size, count), _product(f"{name}: dB", size, rank, T, count, wide=True),
        ]
    return launches


def _passes(name: str, elements: float, count: int) -> Launch:
    """An elementwise launch that reads and writes `elements` bf16 numbers."""
    return Launch(name=name, flop=0.0, bytes=elements * E, count=count)


def step_launches(spec: ModelSpec, *, tokens: int, supervised: int, rank: int, lengths: list[int]) -> list[Launch]:
    """Lists the launches of one micro-batch's forward and backward pass, LoRA on every large projection.

    Args:
        spec: the model.
        tokens: T.
        supervised: rows of the head.
        rank: of the adapters.
        lengths: of the documents; attention costs the sum of their squares.
    """
    T, H, ffn, V = tokens, spec.hidden_size, spec.intermediate_size, spec.vocab_size
    linear = spec.layer_types.count("linear_attention")
    attention = spec.num_layers - linear
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    launches = [
        *_lora("gate|up", T, H, 2 * ffn, [ffn, ffn], rank, spec.num_layers),
        *_lora("down", T, ffn, H, [H], rank, spec.num_layers),
        _passes("norm + residual, forward", 4 * T * H, 2 * spec.num_layers + 1),
        _passes("norm + residual, backward", 4 * T * H, 2 * spec.num_layers + 1),
        _passes("silu * up, forward", 3 * T * ffn, spec.num_layers),
        _passes("silu * up, backward", 5 * T * ffn, spec.num_layers),
        _product("head: logits", supervised, V, H, 1), _product("head: d hidden", supervised, H, V, 1, wide=True),
        _passes("head: softmax and gradient", 3 * supervised * V, 1),
    ]
    if attention:
        gate = q if spec.attention_gate else 0
        pairs = sum(n * n for n in lengths) / 2
        columns = q + gate + 2 * kv
        launches += [
            *_lora("q|k|v", T, H, columns, [q + gate, kv, kv], rank, attention),
            *_lora("o", T, q, H, [H], rank, attention),
            Launch(name="attention, forward", flop=4 * pairs * q, bytes=T * (2 * q + 2 * kv) * E, count=attention),
            Launch(name="attention, backward", flop=14 * pairs * q, bytes=T * (8 * q + 6 * kv) * E, count=attention),
            _passes("attention prologue, both ways", 5 * T * (q + kv), attention),
            _passes("attention gate, both ways", 8 * T * gate, attention),
        ]
    if linear:
        HK, HV, K, D = spec.gdn_key_heads, spec.gdn_value_heads, spec.gdn_key_dim, spec.gdn_value_dim
        channels, values = 2 * HK * K + HV * D, HV * D
        chunk = 64
        # products of a chunk: k k^T, X k, X v, w S, q k^T, q S, (q k^T) v, k^T n; the backward has about 2.5 times them
        rule = 2.0 * T * HV * (chunk * (2 * K + K + 2 * D) + 3 * K * D)
        states = T * HV * K * D / chunk
        launches += [
            *_lora("qkv|z|b|a", T, H, channels + values + 2 * HV, [channels, values], rank, linear),
            *_lora("out", T, values, H, [H], rank, linear),
            Launch(name="delta rule, forward", flop=rule, count=linear,
                   bytes=E * (T * (3 * channels + 3 * values) + 2 * states + T * HV * chunk)),
            Launch(name="delta rule, backward", flop=2.5 * rule, count=linear,
                   bytes=E * (T * (6 * channels + 8 * values) + 6 * states + 3 * T * HV * chunk)),
            _passes("conv, both ways", 5 * T * channels, linear),
            _passes("gated norm, both ways", 8 * T * values, linear),
        ]
    return [launch for launch in launches if launch.bytes]


def floor_ms(launches: list[Launch], chip: Chip) -> float:
    """Returns the sum of the launches' least times on a chip, in milliseconds."""
    return sum(launch.ms(chip) for launch in launches)


def projection(launches: list[Launch], tokens: int, busy_ms: float | None) -> list[dict[str, object]]:
    """Returns a row a chip: the floor, the share of it that an H200 reached, and the estimate that follows.

    Args:
        launches: of one micro-batch.
        tokens: of that micro-batch.
        busy_ms: its GPU-busy time measured on an H200; None gives floors only.
    """
    reached = None if busy_ms is None else floor_ms(launches, CHIPS["H200"]) / busy_ms
    rows: list[dict[str, object]] = []
    for name, chip in CHIPS.items():
        floor = floor_ms(launches, chip)
        estimate = floor if reached is None else floor / reached
        rows.append({
            "chip": name, "tflop_per_s": chip.tflop_per_s, "tb_per_s": chip.tb_per_s, "floor_ms": round(floor, 2),
            "share_reached_on_h200": "" if reached is None else round(reached, 3),
            "busy_ms": round(estimate, 2), "tok_per_s": round(tokens / estimate * 1e3),
            "launches": sum(launch.count for launch in launches),
            "gb": round(sum(launch.bytes * launch.count for launch in launches) / 1e9, 2),
            "tflop": round(sum(launch.flop * launch.count for launch in launches) / 1e12, 2),
            "kind": "measured" if name == "H200" and busy_ms is not None else
            ("ESTIMATE, a floor" if reached is None else "ESTIMATE, the H200's share of the floor"),
            "source": chip.source,
        })
    return rows


def measured_row(path: Path, size: str) -> dict[str, str]:
    """Returns the last row of the native engine's LoRA step on plain rows of this size, nothing recomputed, on an H200.

    Raises:
        SystemExit: the file has none.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if (row["variant"], row["size"], row["recompute"]) == ("native", size, "none")
                and row["lengths"].isdigit() and row["gpu_busy_ms"] and "H200" in row["gpu"]]
    if not rows:
        raise SystemExit(f"{path} has no row of the native engine at {size}, plain rows, recompute none, on an H200.")
    return rows[-1]


def main() -> int:
    """Prints the projection and the launches that cost most on GB10; appends the rows to a CSV if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[name.rpartition("-")[2] for name in CATALOGUE], default="2B")
    parser.add_argument("--tokens", type=int, default=5376)
    parser.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], help="documents; one by default")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--supervised", type=float, default=0.35)
    parser.add_argument("--busy-ms", type=float, help="GPU-busy time of one micro-batch measured on an H200")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--measured", type=Path, help="CSV of lab.side_by_side or lab.profile to take --busy-ms from")
    options = parser.parse_args()
    where: dict[str, object] = {}
    if options.measured:
        row = measured_row(options.measured, options.size)
        options.tokens, options.rank = int(row["lengths"]), int(row["rank"])
        options.supervised, options.busy_ms = float(row["supervised"]), float(row["gpu_busy_ms"]) / int(row["accum"])
        where = {"measured_at": row["date"], "measured_commit": row["commit"], "sitting": row["sitting"]}
    name = next(n for n in CATALOGUE if n.endswith("-" + options.size))
    lengths = options.lengths or [options.tokens]
    if sum(lengths) != options.tokens:
        parser.error(f"--lengths sum to {sum(lengths)}, --tokens is {options.tokens}")
    launches = step_launches(
        spec_from_config(CATALOGUE[name], name), tokens=options.tokens, rank=options.rank, lengths=lengths,
        supervised=int(options.tokens * options.supervised),
    )
    rows = projection(launches, options.tokens, options.busy_ms)
    print("ESTIMATE: nothing here was measured on a GB10.")
    for row in rows:
        print(f"{row['chip']:10s} floor {row['floor_ms']:9} ms  busy {row['busy_ms']:9} ms  {row['tok_per_s']:>8} tok/s"
              f"  ({row['kind']})")
    gb10 = CHIPS["GB10 low"]
    for launch in sorted(launches, key=lambda item: -item.ms(gb10))[:12]:
        bound = "memory" if launch.ms(gb10) > launch.count * launch.flop / gb10.tflop_per_s / 1e9 else "products"
        print(f"  {launch.name:32s} x{launch.count:3d} {launch.ms(gb10):8.2f} ms on GB10, bound by {bound}")
    if options.csv:
        where |= {"size": options.size, "tokens": options.tokens, "documents": len(lengths), "rank": options.rank,
                 "supervised": options.supervised}
        append_rows(options.csv, [{**where, **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
