"""What llama.cpp's converter does to each tensor, as numpy, in both directions: values and names.

Source: conversion/base.py, qwen.py and llama.py of the pinned llama.cpp. For qwen35 it adds one to the zero-centred
norms, stores -exp(A_log), squeezes the convolution, and orders the GDN's value heads tiled (K0 K1 .. K0 K1 ..) instead
of grouped by key head (K0 K0 .. K1 K1 ..). For llama it interleaves the halves of each rotary head. Everything else
keeps its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["KNOWN_ARCHS", "Array", "from_gguf", "is_identity", "neutral_name", "to_gguf"]

Array = npt.NDArray[np.float32]

KNOWN_ARCHS = ("qwen35", "qwen3", "qwen2", "llama")
"""Architectures whose every tensor is understood here."""

_MTP_NAMES = {
    "fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head.norm",
}


def neutral_name(name: str, text: Mapping[str, Any]) -> str | None:
    """Returns the name by which the converter's tables know a checkpoint's tensor; None for what it leaves out.

    Args:
        name: as in the checkpoint, text or multimodal layout.
        text: the text config.
    """
    if "visual." in name:
        return None
    name = name.replace("language_model.", "")
    if name.startswith("mtp.layers."):
        number, rest = name.removeprefix("mtp.layers.").split(".", 1)
        return f"model.layers.{text['num_hidden_layers'] + int(number)}.{rest}"
    if name.startswith("mtp."):
        stem, suffix = name.removeprefix("mtp.").split(".", 1)
        return f"model.layers.{text['num_hidden_layers']}.{_MTP_NAMES.get(stem, stem)}.{suffix}"
    return name.removesuffix(".dt_bias") + ".dt_proj.bias" if name.endswith(".dt_bias") else name


def _permute_value_heads(x: Array, axis: int, outer: int, inner: int, dim: int) -> Array:
    """Swaps the two factors of a head axis: [outer * inner * dim] along `axis` becomes [inner * outer * dim]."""
    shape = x.shape
    split = x.reshape(*shape[:axis], outer, inner, dim, *shape[axis + 1:])
    return np.ascontiguousarray(np.swapaxes(split, axis, axis + 1)).reshape(shape)


def _heads(x: Array, name: str, text: Mapping[str, Any], back: bool) -> Array:
    """Reorders the value heads of one GDN tensor, grouped to tiled, or back."""
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    if keys == values or ".linear_attn." not in name:
        return x
    key_dim, value_dim = text["linear_key_head_dim"], text["linear_value_head_dim"]
    outer, inner = (values // keys, keys) if back else (keys, values // keys)
    if ".in_proj_qkv." in name or ".conv1d." in name:
        first = 2 * keys * key_dim
        return np.concatenate([x[:first], _permute_value_heads(x[first:], 0, outer, inner, value_dim)])
    if ".in_proj_z." in name:
        return _permute_value_heads(x, 0, outer, inner, value_dim)
    if ".out_proj." in name:
        return _permute_value_heads(x, 1, outer, inner, value_dim)
    if name.endswith((".A_log", ".dt_proj.bias")) or ".in_proj_a." in name or ".in_proj_b." in name:
        return _permute_value_heads(x, 0, outer, inner, 1)
    return x


def _zero_centred(name: str) -> bool:
    return name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")


def _rotary_heads(name: str, text: Mapping[str, Any]) -> int | None:
    """Number of heads whose rotary halves llama's converter interleaves in this tensor."""
    heads = text["num_attention_heads"]
    if name.endswith(("q_proj.weight", "q_proj.bias")):
        return int(heads)
    if name.endswith(("k_proj.weight", "k_proj.bias")):
        return int(text.get("num_key_value_heads") or heads)
    return None


def is_identity(name: str, arch: str) -> bool:
    """Whether the converter keeps this tensor's values as they are (it may then be compared in pieces).

    Args:
        name: neutral name.
        arch: GGUF architecture.
    """
    if arch == "qwen35":
        return ".linear_attn." not in name and not _zero_centred(name)
    return not (arch == "llama" and ("q_proj" in name or "k_proj" in name))


def to_gguf(x: Array, name: str, arch: str, text: Mapping[str, Any]) -> Array:
    """Returns what the converter writes for a checkpoint's tensor, before its type is chosen.

    Args:
        x: the checkpoint's values as float32.
        name: neutral name (neutral_name).
        arch: one of KNOWN_ARCHS.
        text: the text config.
    """
    if arch == "llama" and (heads := _rotary_heads(name, text)) is not None:
        split = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
        return np.ascontiguousarray(np.swapaxes(split, 1, 2)).reshape(x.shape)
    if arch != "qwen35":
        return x
    if name.endswith(".conv1d.weight"):
        x = x.reshape(x.shape[0], x.shape[-1])
    x = _heads(x, name, text, back=False)
    if name.endswith(".A_log"):
        return -np.exp(x)
    return x + np.float32(1) if _zero_centred(name) else x


def from_gguf(x: Array, name: str, arch: str, text: Mapping[str, Any]) -> Array:
    """Undoes `to_gguf`: returns a GGUF tensor's values as the checkpoint would hold them (the convolution stays 2-d).

    Args:
        x: dequantised values in the file's order, rows first.
        name: neutral name.
        arch: one of KNOWN_ARCHS.
        text: the text config.
    """
    if arch == "llama" and (heads := _rotary_heads(name, text)) is not None:
        split = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
        return np.ascontiguousarray(np.swapaxes(split, 1, 2)).reshape(x.shape)
    if arch != "qwen35":
        return x
    if name.endswith(".A_log"):
        x = np.log(-x)
    elif _zero_centred(name):
        x = x - np.float32(1)
    return _heads(x, name, text, back=True)
