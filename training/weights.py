"""Weights in and out: a checkpoint's tensors by name into the model, trained tensors back under the base's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparktune.kernels.frozen_weight import StoredRows
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.outfolder import build_folder
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.weights import safetensors_header, safetensors_index, text_tower_shapes
from sparktune.training.quantised import put_stored
from sparktune.training.tower import TextTower

__all__ = [
    "check_checkpoint", "check_tied_head", "checkpoint_names", "export_weights", "load_weights", "names_by_file",
]

IGNORED_PREFIXES = ("mtp.", "model.visual.", "visual.")
"""Of Qwen3.5: the MTP head and the vision tower, which text training neither reads nor changes."""
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Constants that older transformers versions saved."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD_BYTES = 2 * 2**30


def checkpoint_names(index: Mapping[str, Path], spec: ModelSpec) -> dict[str, str]:
    """Returns name in the text layout -> name in the checkpoint, from whichever layout the checkpoint has."""
    multimodal = "model.language_model.embed_tokens.weight" in index
    prefix = "model.language_model." if multimodal else "model."
    return {
        name: prefix + name.removeprefix("model.") if name.startswith("model.") else name
        for name in text_tower_shapes(spec)
    }


def names_by_file(index: Mapping[str, Path], names: Mapping[str, str]) -> dict[Path, list[str]]:
    """Returns file -> names in the text layout of the tensors in it: each file is opened once.

    Args:
        index: name in the checkpoint -> file.
        names: from `checkpoint_names`.
    """
    found: dict[Path, list[str]] = {}
    for name, there in names.items():
        found.setdefault(index[there], []).append(name)
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def check_checkpoint(model_dir: Path, spec: ModelSpec, index: Mapping[str, Path], names: Mapping[str, str]) -> None:
    """Raises PreflightError that names missing, unexpected and misshapen tensors."""
    expected = text_tower_shapes(spec)
    missing = [there for there in names.values() if there not in index]
    known = {*names.values(), "lm_head.weight"}
    extra = [
        n for n in index
        if n not in known and not n.startswith(IGNORED_PREFIXES) and not n.endswith(_IGNORED_SUFFIXES)
    ]
    headers = {file: safetensors_header(file) for file in set(index.values())}
    wrong = []
    for name, there in names.items():
        if there not in index:
            continue
        entry = headers[index[there]][there]
        if entry.shape != expected[name]:
            wrong.append(f"{there} is {list(entry.shape)}, expected {list(expected[name])}")
        elif entry.dtype not in _DTYPES:
            wrong.append(f"{there} is {entry.dtype}, expected a floating-point type of 16 bits or more")
    kinds = {"are missing": missing, "are not part of this architecture": extra, "do not fit": wrong}
    problems = [f"{len(found)} tensors {what}: {_listed(found)}" for what, found in kinds.items() if found]
    if problems:
        raise PreflightError(
            f"{model_dir} should hold the weights of a {spec.model_type} model as its config.json describes it; "
            f"{'; '.join(problems)}. Config and weights are of different models, or the folder is incomplete."
        )


def check_tied_head(
    spec: ModelSpec, model_dir: Path, index: Mapping[str, Path], names: Mapping[str, str], dtype: torch.dtype
) -> None:
    """A tied checkpoint may repeat the embedding as lm_head.weight, but must not say something else there.

    Raises:
        PreflightError: it does, compared in the compute type `dtype`.
    """
    if not spec.tie_word_embeddings or "lm_head.weight" not in index:
        return
    there = names["model.embed_tokens.weight"]
    with safe_open(index["lm_head.weight"], framework="pt") as file:
        head = file.get_tensor("lm_head.weight").to(dtype)
    with safe_open(index[there], framework="pt") as file:
        embedding = file.get_tensor(there).to(dtype)
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise PreflightError(
            f"config.json of {model_dir} ties the output projection to the embedding (tie_word_embeddings), but "
            "lm_head.weight differs from the embedding. Set tie_word_embeddings to false if the head is its own."
        )


@torch.no_grad()
def load_weights(
    model: TextTower, model_dir: Path, spec: ModelSpec,
    store: Callable[[str, torch.Tensor], StoredRows] | None = None,
) -> None:
    """Fills the model from a checkpoint's safetensors, one tensor at a time, straight into the grouped weights.

    Args:
        model: from `build_model`, with or without adapters.
        model_dir: folder of a single-file or sharded checkpoint, in the text or the multimodal layout. `mtp.*` and
            the vision tower are left where they are.
        spec: the model's.
        store: for a model from `quantised.build_hollow`: turns (projection, weight) into its stored form.

    Raises:
        PreflightError: tensors are missing, unexpected or misshapen (named), or files are missing or damaged.
    """
    index = safetensors_index(model_dir)
    names = checkpoint_names(index, spec)
    check_checkpoint(model_dir, spec, index, names)
    slots, parameters = model.slots(), dict(model.named_parameters())
    assert slots.keys() == names.keys(), "the model and text_tower_shapes describe the same tensors"
    stored: dict[str, dict[str, StoredRows]] = {}
    for path, held in names_by_file(index, names).items():
        with safe_open(path, framework="pt") as file:
            for name in held:
                slot, value = slots[name], file.get_tensor(names[name])
                if store is not None and parameters[slot.parameter].is_meta:
                    projection = name.split(".")[-2]
                    rows = store(projection, value.to(model.device, model.dtype))
                    stored.setdefault(slot.parameter, {})[projection] = rows
                else:
                    slot.of(parameters[slot.parameter]).copy_(value)
    if stored:
        put_stored(model, stored)
    check_tied_head(spec, model_dir, index, names, model.dtype)


@torch.no_grad()
def export_weights(
    model: TextTower, model_dir: Path, folder: Path | None, masters: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the trained tensors under the base's names and in the base's types, rounded once from the masters.

    A tied base that repeats the embedding as lm_head.weight gets both.

    Args:
        model: fully fine-tuned.
        model_dir: the base it was loaded from.
        folder: becomes a folder of `*.safetensors`, whole or not at all. None: nothing is written, but every value is
            asked for in the same order, for they may be gathered from all ranks.
        masters: parameter name -> full-precision value; the parameter itself where there is none.

    Raises:
        PreflightError, SparktuneError: the folder cannot be written or the disk is full.
    """
    index = safetensors_index(model_dir)
    names = checkpoint_names(index, model.spec)
    values: Mapping[str, torch.Tensor] = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if masters:
        assert masters.keys() == values.keys(), "the optimiser owns what learns"
        values = masters
    todo = [(names[n], slot) for n, slot in model.slots().items() if slot.parameter in values]
    embedding = model.slots()["model.embed_tokens.weight"]
    if model.spec.tie_word_embeddings and "lm_head.weight" in index and embedding.parameter in values:
        todo.append(("lm_head.weight", embedding))
    if folder is None:
        for _, slot in todo:
            values[slot.parameter]
        return
    headers = {file: safetensors_header(file) for file in set(index.values())}
    entries = {there: headers[index[there]][there] for there, _ in todo}
    total = sum(e.end - e.begin for e in entries.values())
    with build_folder(folder, needs_bytes=total, what="The trained weights", replace=lambda _: True) as partial:
        shard: dict[str, torch.Tensor] = {}
        size, number = 0, 0
        for i, (there, slot) in enumerate(todo):
            shard[there] = slot.of(values[slot.parameter]).to("cpu", _DTYPES[entries[there].dtype]).contiguous().clone()
            size += entries[there].end - entries[there].begin
            if size >= _SHARD_BYTES or i == len(todo) - 1:
                number += 1
                save_file(shard, partial / f"trained-{number:05d}.safetensors", metadata={"format": "pt"})
                shard, size = {}, 0
