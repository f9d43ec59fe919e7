"""A PEFT LoRA adapter as the merge sees it: which base tensor gets which low-rank update. No torch, no PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparktune.setup.export.rounding import FLOAT_BYTES, to_float32
from sparktune.setup.plan.errors import SparktuneError, UsageError
from sparktune.setup.plan.untrusted import excerpt, json_object_file
from sparktune.setup.plan.weights import TensorEntry, safetensors_header

__all__ = ["Adapter", "LowRank", "read_adapter"]

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_START = ".base_layer.weight"
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.default)?(\.weight)?")
# Names of modules, and the patterns people write for them. What repeats a group is left out: matching such a pattern
# may take longer than the universe has been there.
_PATTERN = re.compile(r"(?:[\w.|()^$-]|\\\.|\.\*|(?:\\d|\[[\w-]+\])\+?){1,300}")
_MOST_REPEATS = 4
_LARGEST_SCALE = 1e9
# Initialisations that also change the base's weights: W + scale * B A is then not the trained model.
_REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED: dict[str, str] = {
    "use_dora": "DoRA rescales every row, which is more than W + scale * B A",
    "use_qalora": "QALoRA pools its input",
    "alora_invocation_tokens": "an activated LoRA is off for part of the tokens and cannot be merged",
    "layer_replication": "it replicates layers, so it has no place in the base's tensors",
    "target_parameters": "it adapts bare parameters",
    "trainable_token_indices": "it replaces single token embeddings",
    "use_bdlora": "block-diagonal LoRA is not W + scale * B A over whole matrices",
    "megatron_config": "it was trained on Megatron layers",
    "fan_in_fan_out": "its layers store transposed weights (GPT-2's Conv1D)",
    "lora_bias": "its lora_B has a bias, for which the base has no tensor",
}


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The update `scale * B @ A` of one base tensor."""

    tensor: str
    """Name of the base tensor."""
    a: TensorEntry
    """[r, in]; of an embedding: [r, vocabulary]."""
    b: TensorEntry
    """[out, r]; of an embedding: [hidden, r], and the update is the transpose of `scale * B @ A`."""
    scale: float
    embedding: bool
    start: TensorEntry | None = None
    """The W that PEFT saved beside the update (it does for embeddings and heads); None: the base's own."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder, checked against its base."""

    path: Path
    """adapter_model.safetensors."""
    updates: tuple[LowRank, ...]
    replaced: dict[str, TensorEntry]
    """Base tensor -> its new value (PEFT's modules_to_save and biases)."""
    zero_b: tuple[str, ...]
    """Base tensors whose B is all zero."""

    def read(self, entry: TensorEntry) -> npt.NDArray[np.float32]:
        """Returns one of the adapter's tensors as float32."""
        with self.path.open("rb") as file:
            file.seek(entry.begin)
            return to_float32(file.read(entry.end - entry.begin), entry.dtype).reshape(entry.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json, refusing every variant that the merge would get wrong.

    Raises:
        UsageError: not readable, not LoRA, or a kind of LoRA that is more than W + scale * B A.
    """
    path = folder / "adapter_config.json"
    try:
        config = json_object_file(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} should be the JSON file that PEFT writes beside an adapter; it is not ({error})."
        ) from error
    if config.get("peft_type") != "LORA":
        seen = excerpt(config.get("peft_type"))
        raise UsageError(f"{path} should have peft_type LORA; it says {seen}. Only LoRA can be merged.")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise UsageError(f"{path} sets {key}: {why}. Merge this adapter with PEFT itself.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REBASED):
        raise UsageError(
            f"{path} says init_lora_weights {excerpt(init)}, which changed the base's weights before training, so "
            "adding B A to the published base would be wrong. Convert it with PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion) first."
        )
    if type(config.get("r")) is not int or config["r"] < 1:
        seen = excerpt(config.get("r"))
        raise UsageError(f"{path} should give the rank `r` as a whole number above 0; it gives {seen}.")
    _checked_patterns(config, path)
    return config


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of `module`, as PEFT's get_pattern_key does."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _checked_patterns(config: dict[str, Any], path: Path) -> None:
    """Refuses rank_pattern and alpha_pattern that are not names of modules (or plain patterns of them) -> numbers."""
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field)
        if patterns is None:
            continue
        if not isinstance(patterns, dict):
            raise UsageError(f"{path}: {field} should map names of modules to numbers; it is {excerpt(patterns)}.")
        for key, value in patterns.items():
            if not _is_pattern(key):
                raise UsageError(
                    f"{path}: {field} holds {excerpt(key)}; names of modules are read, with `.*`, `\\d+`, `|` and "
                    "plain brackets in them. Merge this adapter with PEFT itself."
                )
            _number(value, f"{field} of {excerpt(key)}", path)


def _is_pattern(key: str) -> bool:
    if not _PATTERN.fullmatch(key) or key.count("*") + key.count("+") > _MOST_REPEATS:
        return False
    try:
        re.compile(key)
    except re.error:
        return False
    return True


def _number(value: Any, what: str, path: Path) -> float:
    if type(value) not in (int, float) or not 0 < value < _LARGEST_SCALE:
        raise UsageError(f"{path}: {what} should be a number above 0; it is {excerpt(value)}.")
    return float(value)


def _scale(config: dict[str, Any], module: str, rank: int, path: Path) -> float:
    said = _pattern(config.get("rank_pattern"), module, config["r"])
    if said != rank:
        raise UsageError(
            f"{path}: adapter_config.json gives {module} the rank {excerpt(said)} (r and rank_pattern), its lora_A has "
            f"{rank} rows. Config and weights are of different adapters."
        )
    alpha = _number(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)), "lora_alpha", path)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _base_name(name: str, base: Mapping[str, TensorEntry]) -> str | None:
    """Returns the base's name of a tensor that the adapter names in either layout (text or multimodal)."""
    candidates = [name]
    if name.startswith("model.language_model."):
        candidates.append("model." + name.removeprefix("model.language_model."))
    elif name.startswith("language_model.model."):
        rest = name.removeprefix("language_model.model.")
        candidates += ["model.language_model." + rest, "model." + rest]
    elif name.startswith("model."):
        candidates.append("model.language_model." + name.removeprefix("model."))
    return next((c for c in candidates if c in base), None)


def _check_pair(path: Path, module: str, a: TensorEntry, b: TensorEntry, target: TensorEntry, embedding: bool) -> None:
    for part in (a, b):
        if part.dtype not in FLOAT_BYTES or len(part.shape) != 2:
            raise UsageError(f"{path}: the adapter of {module} should be two float matrices; one is {part.dtype} "
                             f"{list(part.shape)}. Only linear layers and embeddings are merged.")
    out, inner = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
    if a.shape[0] != b.shape[1] or target.shape != (out, inner):
        raise UsageError(
            f"{path}: the adapter of {module} (A {list(a.shape)}, B {list(b.shape)}) does not fit the base's tensor "
            f"{list(target.shape)}. It was trained on another base: give that one with --base."
        )


def _refuse_tied(path: Path, names: list[str], tied: bool) -> None:
    heads = [n for n in names if n.rsplit(".", 1)[0].endswith(("lm_head", "embed_tokens"))]
    if tied and heads:
        raise UsageError(
            f"{path} adapts {heads[0].rsplit('.', 1)[0]}, but this base ties its output head to its embeddings: one "
            "tensor serves as both, and merging would change the other one too. Train without lm_head and embed_tokens "
            "in --target-modules, or use a base with a head of its own."
        )


def _pairs(
    path: Path, header: dict[str, TensorEntry], config: dict[str, Any]
) -> tuple[dict[str, dict[str, TensorEntry]], dict[str, TensorEntry]]:
    """Sorts the adapter's keys into module -> {lora_A, lora_B, ...} and whole replaced tensors."""
    pairs: dict[str, dict[str, TensorEntry]] = {}
    whole: dict[str, TensorEntry] = {}
    for key, entry in header.items():
        if not key.startswith(_PREFIX) or "lora_magnitude_vector" in key:
            raise UsageError(f"{path}: PEFT's LoRA writes keys like {_PREFIX}MODULE.lora_A.weight; seen: {key}.")
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match:
            pairs.setdefault(match["module"], {})[match["part"]] = entry
        else:
            whole[key.removeprefix(_PREFIX).replace(".modules_to_save", "")] = entry
    whole_pairs = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
    halves = [module for module, parts in pairs.items() if set(parts) not in whole_pairs]
    if halves:
        raise UsageError(f"{path}: {halves[0]} should have both A and B; it has {sorted(pairs[halves[0]])}. "
                         "The file is incomplete: copy it again.")
    if not pairs and not whole:
        raise UsageError(f"{path} holds no adapter tensors. It comes from a run that saved nothing: train again.")
    return pairs, whole


def read_adapter(folder: Path, base: Mapping[str, TensorEntry], *, tied: bool) -> Adapter:
    """Reads a PEFT LoRA adapter and finds the base tensor of each of its modules.

    Both layouts of key names are understood (`base_model.model.model.layers...` and
    `...model.language_model.layers...`), whichever the base has. Scales follow PEFT: alpha / r, or alpha / sqrt(r) with
    use_rslora, with rank_pattern and alpha_pattern.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        base: the base's tensors.
        tied: the base's output head is its embedding.

    Raises:
        UsageError: a kind of adapter that cannot be merged, unknown modules (named), shapes that do not fit, an adapter
            of a tied head.
        SparktuneError: every B is zero (the adapter was not trained, or was saved before it loaded), or a value is not
            finite.
        PreflightError: the file is missing or damaged.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = (folder / "adapter_model.bin").is_file()
        raise UsageError(
            f"{folder} should hold {WEIGHTS}; "
            + ("it holds adapter_model.bin, a pickle, which is never opened here. Save the adapter again with "
               "safe_serialization=True." if pickle else "it does not. Give the folder that "
               "PEFT's save_pretrained wrote.")
        )
    pairs, whole = _pairs(path, safetensors_header(path), config)
    starts = {n.removesuffix(_START): whole.pop(n) for n in list(whole) if n.removesuffix(_START) in pairs}
    wanted = {m: f"{m}.weight" for m in pairs} | {n: n for n in whole}
    _refuse_tied(path, list(wanted.values()), tied)
    found = {source: _base_name(name, base) for source, name in wanted.items()}
    unknown = [source for source, name in found.items() if name is None]
    if unknown:
        shown = ", ".join(unknown[:10]) + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        raise UsageError(
            f"{path} adapts {len(unknown)} modules that the base does not have: {shown}. The adapter belongs to "
            f"{excerpt(config.get('base_model_name_or_path'))} (adapter_config.json): merge it into that model."
        )
    updates = []
    for module, parts in pairs.items():
        embedding = "lora_embedding_A" in parts
        a, b = (parts["lora_embedding_" + x] if embedding else parts["lora_" + x] for x in "AB")
        name = str(found[module])
        _check_pair(path, module, a, b, base[name], embedding)
        scale = _scale(config, module, a.shape[0], path)
        updates.append(LowRank(tensor=name, a=a, b=b, scale=scale, embedding=embedding, start=starts.get(module)))
    for source, entry in [*whole.items(), *starts.items()]:
        shape = base[str(found[source])].shape
        if shape != entry.shape:
            raise UsageError(f"{path}: {source} is {list(entry.shape)}, the base's is {list(shape)}. It was trained on "
                             "another base: give that one with --base.")
    return _checked(Adapter(path=path, updates=tuple(updates), zero_b=(),
                            replaced={str(found[s]): e for s, e in whole.items()}))


def _checked(adapter: Adapter) -> Adapter:
    """Looks at the values: all finite, and not every B zero."""
    zero = []
    for update in adapter.updates:
        a, b = adapter.read(update.a), adapter.read(update.b)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise SparktuneError(f"{adapter.path}: the adapter of {update.tensor} holds NaN or infinity: its training "
                                 "diverged. Train again with a lower --learning-rate.")
        if not b.any():
            zero.append(update.tensor)
    if zero and len(zero) == len(adapter.updates) and not adapter.replaced:
        raise SparktuneError(
            f"{adapter.path}: lora_B is zero in all {len(zero)} modules, so the merged model would be the base. Either "
            "no step was trained, or the adapter was saved from a model into which it had not loaded (key names of the "
            "other layout load with a warning only)."
        )
    return Adapter(path=adapter.path, updates=adapter.updates, replaced=adapter.replaced, zero_b=tuple(zero))
