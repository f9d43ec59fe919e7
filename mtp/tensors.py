"""The 15 tensors of a dense Qwen3.5's MTP head: their names, their shapes, and how their bytes move between files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.weights import TensorEntry

__all__ = ["PREFIX", "Place", "check_head", "mtp_shapes", "write_safetensors"]

PREFIX = "mtp."
"""vLLM drops heads named `model.mtp.` without a word; only this prefix is served."""

Place = tuple[Path, TensorEntry]
"""A tensor's file and its place in it."""

_COPY_STEP = 16 * 2**20


def mtp_shapes(text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the head's tensors for a text config: hidden H, ffn I, heads nH and nKV, head dim D.

    Source: the loaders of vLLM and llama.cpp for `qwen3_5`; q_proj carries a gate beside every query.
    """
    hidden, ffn, dim = text["hidden_size"], text["intermediate_size"], text.get("head_dim", 256)
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    layer = PREFIX + "layers.0."
    return {
        PREFIX + "fc.weight": (hidden, 2 * hidden),
        PREFIX + "pre_fc_norm_embedding.weight": (hidden,),
        PREFIX + "pre_fc_norm_hidden.weight": (hidden,),
        PREFIX + "norm.weight": (hidden,),
        layer + "input_layernorm.weight": (hidden,),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "self_attn.q_proj.weight": (2 * heads * dim, hidden),
        layer + "self_attn.k_proj.weight": (kv_heads * dim, hidden),
        layer + "self_attn.v_proj.weight": (kv_heads * dim, hidden),
        layer + "self_attn.o_proj.weight": (hidden, heads * dim),
        layer + "self_attn.q_norm.weight": (dim,),
        layer + "self_attn.k_norm.weight": (dim,),
        layer + "mlp.gate_proj.weight": (ffn, hidden),
        layer + "mlp.up_proj.weight": (ffn, hidden),
        layer + "mlp.down_proj.weight": (hidden, ffn),
    }


def _finite(place: Place) -> bool:
    """Whether a float tensor holds no NaN or infinity: their exponent bits are all ones."""
    file, entry = place
    kind, exponent = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}[entry.dtype]
    with file.open("rb") as stream:
        stream.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            piece = stream.read(min(left, _COPY_STEP))
            if ((np.frombuffer(piece, kind) & exponent) == exponent).any():
                return False
            left -= len(piece)
    return True


def check_head(head: Mapping[str, Place], text: Mapping[str, Any], where: str) -> None:
    """Checks that `head` is a whole MTP head of this model: 15 names, shapes, float types, finite values.

    Args:
        head: the `mtp.*` tensors.
        text: the text config of the model that gets them.
        where: what messages call the head's source.

    Raises:
        UsageError: names, shapes or types are not this model's.
        SparktuneError: a value is not finite.
    """
    wanted = mtp_shapes(text)
    missing, extra = sorted(wanted.keys() - head.keys()), sorted(head.keys() - wanted.keys())
    if missing or extra:
        raise UsageError(
            f"{where} should hold the {len(wanted)} tensors of a dense Qwen3.5's MTP head; missing: "
            f"{', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}."
        )
    for name, (_, entry) in head.items():
        if entry.shape != wanted[name]:
            raise UsageError(f"{where}: {name} should be {list(wanted[name])} by config.json, it is "
                             f"{list(entry.shape)}. The head belongs to a model of another size.")
        if entry.dtype not in ("BF16", "F16", "F32"):
            raise UsageError(f"{where}: {name} is stored as {entry.dtype}; the head is kept unquantised (bf16).")
    broken = sorted(name for name, place in head.items() if not _finite(place))
    if broken:
        raise SparktuneError(f"{where}: {', '.join(broken)} hold NaN or infinity. Fetch or train the head again.")


def write_safetensors(path: Path, tensors: Iterable[tuple[str, Place]]) -> int:
    """Writes a safetensors file whose tensors are byte copies of ranges of other files. Returns its size in bytes.

    Args:
        path: file to make; must not exist.
        tensors: name and place of each, in the order of the file.
    """
    chosen = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (_, entry) in chosen:
        size = entry.end - entry.begin
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for _, (file, entry) in chosen:
            with file.open("rb") as stream:
                stream.seek(entry.begin)
                left = entry.end - entry.begin
                while left:
                    piece = stream.read(min(left, _COPY_STEP))
                    if not piece:
                        raise SparktuneError(f"{file} became shorter while it was copied. Start again.")
                    out.write(piece)
                    left -= len(piece)
    return 8 + len(raw) + offset
