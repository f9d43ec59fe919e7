"""What lies in a checkpoint folder, read from the headers of its safetensors files alone; no torch, no pickle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.untrusted import json_object, json_object_file, whole_number

__all__ = ["TensorEntry", "header_entries", "safetensors_header", "safetensors_index", "text_tower_shapes"]

INDEX_NAME = "model.safetensors.index.json"
_LONGEST_NAME = 255
"""Bytes of a file's name on every file system here."""
MAX_HEADER_BYTES = 100 * 2**20
"""The safetensors format's own limit on a header."""
# What the safetensors library (0.6 and newer) knows; one value's bits.
_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "C64": 64,
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor as a safetensors header describes it."""

    dtype: str
    """safetensors spelling: F32, BF16, ..."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    """One past the last byte, counted from the start of the file."""


def _broken(path: Path, seen: str) -> PreflightError:
    return PreflightError(
        f"{path} should be a complete safetensors file, but {seen}. The file is damaged or its download was cut off: "
        "fetch it again."
    )


def header_entries(path: Path, size: int, raw: bytes) -> dict[str, TensorEntry]:
    """Returns the tensors that a safetensors header describes.

    Args:
        path: what messages call the file.
        size: of the whole file, in bytes.
        raw: the JSON header, what follows the file's first eight bytes.

    Raises:
        PreflightError: the header is damaged, or does not describe a file of this size.
    """
    data_start = 8 + len(raw)
    try:
        # what the library that reads the data would refuse is refused here, with a sentence
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with {")
        header = json_object(raw)
        _check_metadata(header.pop("__metadata__", None))
        entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    except ValueError as error:
        raise _broken(path, f"its header is damaged ({error})") from error
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            seen = f"{entry.begin - data_start} to {entry.end - data_start}, not from {end - data_start}"
            raise _broken(path, f"`{name[:64]}` ({entry.dtype} {list(entry.shape)}) claims the bytes {seen}")
        end = entry.end
    if end != size:
        raise _broken(path, f"its header describes {end} bytes and the file has {size}")
    return entries


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no mapping of texts")


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    """Returns one tensor's entry; raises ValueError where it contradicts itself."""
    shown = name[:64]
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"it describes `{shown}` without dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ValueError(f"`{shown}` is of no type that safetensors has")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"`{shown}` should have a list as shape and two data_offsets")
    bits = _DTYPE_BITS[dtype]
    for n in shape:
        bits *= whole_number(n, f"a dimension of `{shown}`")
    begin, end = (whole_number(n, f"an offset of `{shown}`") for n in offsets)
    if begin > end or bits != 8 * (end - begin):
        raise ValueError(f"`{shown}` ({dtype} {shape}) claims the bytes {begin} to {end}")
    return TensorEntry(dtype=dtype, shape=tuple(shape), begin=data_start + begin, end=data_start + end)


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """Returns the tensors of one safetensors file without reading their data.

    Args:
        path: the file.

    Raises:
        PreflightError: the file is missing, damaged or cut off.

    Source: the safetensors format: u64 little-endian header length, JSON header, data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _broken(path, f"it has {size} bytes and announces a header of {length}")
            raw = file.read(length)
    except OSError as error:
        raise PreflightError(f"{path} should be a readable safetensors file: {error.strerror or error}.") from error
    return header_entries(path, size, raw)


def _index_of_files(folder: Path, files: list[Path]) -> dict[str, Path]:
    index: dict[str, Path] = {}
    for file in files:
        for name in safetensors_header(file):
            if name in index:
                raise PreflightError(
                    f"Every tensor of {folder} should lie in one file, but `{name}` is in {index[name].name} and in "
                    f"{file.name}. Keep the files of one checkpoint only."
                )
            index[name] = file
    return index


def _index_of_map(folder: Path) -> dict[str, Path]:
    path = folder / INDEX_NAME
    try:
        weight_map = json_object_file(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("it has no `weight_map` from names to files")
        files: dict[str, str] = weight_map
    except (OSError, ValueError) as error:
        raise PreflightError(
            f"{path} should be a JSON object with a `weight_map`; it is not ({error}). Fetch it again."
        ) from error
    outside = sorted({f for f in files.values() if Path(f).name != f or len(f.encode()) > _LONGEST_NAME})
    if outside:
        raise PreflightError(f"{path} should name files of its own folder; it names {outside[0][:100]!r}.")
    other = sorted({f for f in files.values() if not f.endswith(".safetensors")})
    if other:
        raise PreflightError(
            f"{path} should name *.safetensors files, which alone are opened here; it names {other[0]!r}. Save the "
            "model with `save_pretrained` (safetensors is its default) or fetch the safetensors files."
        )
    missing = sorted({f for f in files.values() if not (folder / f).is_file()})
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise PreflightError(
            f"{folder} lacks {len(missing)} of {len(set(files.values()))} shards named by {INDEX_NAME}: {shown}. "
            "Finish the download, or copy the missing files there."
        )
    headers = {f: safetensors_header(folder / f) for f in sorted(set(files.values()))}
    for name, file in files.items():
        if name not in headers[file]:
            raise PreflightError(
                f"{path} places `{name}` in {file}, but that shard does not hold it. Index and shards are of "
                "different checkpoints: fetch the folder again."
            )
    return {name: folder / file for name, file in files.items()}


def safetensors_index(folder: Path) -> dict[str, Path]:
    """Returns the file that holds each tensor of a single-file or sharded checkpoint.

    Reads headers only and checks them against the files' sizes.

    Args:
        folder: the checkpoint's folder.

    Raises:
        PreflightError: no safetensors there, a shard is missing (named) or damaged, or index and shards disagree.
    """
    if (folder / INDEX_NAME).is_file():
        return _index_of_map(folder)
    single = folder / "model.safetensors"
    if single.is_file():
        return _index_of_files(folder, [single])
    files = sorted(f for f in folder.glob("*.safetensors") if f.name != "adapter_model.safetensors")
    if not files:
        other = sorted(f.name for f in folder.glob("*") if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        seen = f"only {other[0]}, a pickle, which is never opened here" if other else "none"
        raise PreflightError(
            f"{folder} should hold the weights as *.safetensors; seen: {seen}. "
            "Save the model with `save_pretrained` (safetensors is its default) or fetch the safetensors files."
        )
    numbered = [(f, m) for f in files if (m := _SHARD.search(f.name))]
    for file, match in numbered:
        present = {int(m.group(1)) for _, m in numbered if m.group(2) == match.group(2)}
        absent = sorted(set(range(1, int(match.group(2)) + 1)) - present)
        if absent:
            name = _SHARD.sub(f"-{absent[0]:05d}-of-{match.group(2)}.safetensors", file.name)
            raise PreflightError(f"{folder} lacks the shard {name}. Finish the download, or copy the file there.")
    return _index_of_files(folder, files)


def _attention_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    q_out = spec.num_heads * spec.head_dim * (2 if spec.attention_gate else 1)
    kv_out = spec.num_kv_heads * spec.head_dim
    inner, hidden = spec.num_heads * spec.head_dim, spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in (("q_proj", q_out), ("k_proj", kv_out), ("v_proj", kv_out)):
        shapes[f"self_attn.{name}.weight"] = (rows, hidden)
        if spec.attention_bias:
            shapes[f"self_attn.{name}.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (hidden, inner)
    if spec.attention_output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if spec.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    return shapes


def _delta_net_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    value = spec.gdn_value_heads * spec.gdn_value_dim
    channels = 2 * spec.gdn_key_heads * spec.gdn_key_dim + value
    hidden, heads = spec.hidden_size, spec.gdn_value_heads
    return {
        "linear_attn.in_proj_qkv.weight": (channels, hidden),
        "linear_attn.in_proj_z.weight": (value, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.out_proj.weight": (hidden, value),
        "linear_attn.conv1d.weight": (channels, 1, spec.gdn_conv_kernel),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (spec.gdn_value_dim,),
    }


def text_tower_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor of the text tower, in the text layout (`model.layers.0. ...`).

    `lm_head.weight` is listed only when it is not tied to the embedding. In the multimodal layout the leading
    `model.` reads `model.language_model.`.
    """
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for layer, kind in enumerate(spec.layer_types):
        block = _delta_net_shapes(spec) if kind == "linear_attention" else _attention_shapes(spec)
        for name, rows, columns in (("gate_proj", ffn, hidden), ("up_proj", ffn, hidden), ("down_proj", hidden, ffn)):
            block[f"mlp.{name}.weight"] = (rows, columns)
            if spec.mlp_bias:
                block[f"mlp.{name}.bias"] = (rows,)
        block["input_layernorm.weight"] = block["post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes
