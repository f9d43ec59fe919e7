"""Which model is meant: its shape from config.json alone, the Qwen3.5 catalogue, and the folder of its weights.

No torch and no weights: `probe` reads one small JSON file. `resolve_model_dir` is the only function that may download
weights, and it takes safetensors, JSON, text and templates only.
"""

from __future__ import annotations

import logging
import os
import re
import reprlib
from pathlib import Path
from typing import Any, Literal

from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.untrusted import json_object_file
from sparktune.setup.plan.weights import safetensors_index, text_tower_shapes

__all__ = [
    "CATALOGUE", "DOWNLOAD_PATTERNS", "NATIVE_FAMILIES", "adapter_base", "is_adapter_folder", "is_hub_id", "probe",
    "resolve_model_dir", "safetensors_index", "spec_from_config", "text_tower_shapes",
]

NATIVE_FAMILIES = ("qwen3_5_text", "qwen2", "qwen3", "llama", "mistral")
"""`model_type` of the text towers that the native engine trains."""
DOWNLOAD_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja")
"""Everything a checkpoint folder may bring: no pickles, no code."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_LAYER_KINDS = ("full_attention", "linear_attention", "sliding_attention")
LayerKind = Literal["full_attention", "linear_attention", "sliding_attention"]
_MOST_LAYERS = 4096
"""Every layer is written out by name; no language model has near as many."""
_LARGEST_SIZE = 2**31
_LARGEST_NUMBER = 1e30
_log = logging.getLogger(__name__)


def _qwen3_5(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, gdn_heads: int, tied: bool
) -> dict[str, Any]:
    text = {
        "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 256,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "linear_num_key_heads": 16, "linear_num_value_heads": gdn_heads,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4, "attn_output_gate": True, "mtp_num_hidden_layers": 1,
        "max_position_embeddings": 262144, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }
    return {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": tied}


CATALOGUE: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3.5-0.8B": _qwen3_5(1024, 3584, 24, 8, 2, 16, True),
    "Qwen/Qwen3.5-2B": _qwen3_5(2048, 6144, 24, 8, 2, 16, True),
    "Qwen/Qwen3.5-4B": _qwen3_5(2560, 9216, 32, 16, 4, 32, True),
    "Qwen/Qwen3.5-9B": _qwen3_5(4096, 12288, 32, 16, 4, 32, False),
    "Qwen/Qwen3.5-27B": _qwen3_5(5120, 17408, 64, 24, 4, 48, False),
}
"""Hub id -> config of the published sizes, for planning without a network. A checkpoint's own config.json decides."""


def is_adapter_folder(path: Path) -> bool:
    """Returns whether `path` is a PEFT adapter folder without a model in it."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def adapter_base(folder: Path) -> str:
    """Returns the base model that a PEFT adapter folder names: a local folder (made absolute) or a hub id.

    Raises:
        UsageError: adapter_config.json is unreadable or names no base.
    """
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UsageError(
            f"{folder / 'adapter_config.json'} should name its base in `base_model_name_or_path`; it does not. "
            "Write the base model's folder or hub id there."
        )
    for candidate in (Path(os.path.expanduser(base)), folder / base):
        if os.path.isdir(candidate):  # of a name that is too long, Path.is_dir raises
            if is_adapter_folder(candidate):
                raise UsageError(
                    f"The base of the adapter {folder} should be a model; {candidate} is an adapter too. "
                    "Merge that one first."
                )
            return str(candidate.resolve())
    return base


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json_object_file(path)
    except OSError as error:
        raise PreflightError(f"{path} should be readable: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"{path} should be JSON, an object; it is not ({error}).") from error


def is_hub_id(source: str) -> bool:
    """Returns whether `source` is spelled as a model of an owner on the hub, as OWNER/NAME."""
    return source.count("/") == 1 and _HUB_ID.fullmatch(source) is not None


def _local_folder(source: str) -> Path | None:
    """Returns the folder `source` means, None for a hub id; raises for what is neither."""
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise UsageError(f"--model {source} should be a folder or a hub id; it is a file. Give its folder.")
    if source.startswith(("/", "./", "../", "~")) or not _HUB_ID.fullmatch(source):
        raise UsageError(
            f"--model {source} should be an existing folder or a hub id such as Qwen/Qwen3.5-2B; "
            "there is no such folder."
        )
    return None


def _hub_file(source: str, name: str, revision: str | None) -> Path | None:
    """Returns a small file of a hub repository (cached, or fetched), None when the repository lacks it."""
    import huggingface_hub
    from huggingface_hub import errors

    # A cached copy is enough for a shape; without a network, asking the hub costs half a minute of retries.
    cached = huggingface_hub.try_to_load_from_cache(source, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(huggingface_hub.hf_hub_download(source, name, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        raise PreflightError(
            f"{name} of {source} is neither in the local Hugging Face cache nor reachable. Connect once, or give "
            "--model a folder that holds the model."
        ) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UsageError(
            f"--model {source} should be a folder or a hub id; the hub knows no such model{at}, or it is gated "
            "(log in with `hf auth login`)."
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise PreflightError(
            f"{name} of {source} could not be fetched ({type(error).__name__}: {error}). Check the network, or give "
            "--model a folder that holds the model."
        ) from error


def _hub_spec(source: str, revision: str | None) -> ModelSpec:
    try:
        config = _hub_file(source, "config.json", revision)
        adapter = None if config else _hub_file(source, "adapter_config.json", revision)
    except PreflightError:
        known = CATALOGUE.get(source.removesuffix("-Base"))
        if known is None or revision is not None:
            raise
        _log.info("%s is not reachable; its shape is taken from the built-in catalogue.", source)
        return spec_from_config(known, source)
    if config:
        return spec_from_config(_read_json(config), source)
    if adapter:
        return probe(adapter_base(adapter.parent))
    raise UsageError(f"--model {source} has neither config.json nor adapter_config.json on the hub: it is no model.")


def probe(source: str, revision: str | None = None) -> ModelSpec:
    """Returns the shape of a model from its config.json alone; never touches weights.

    Args:
        source: a local model folder, a local PEFT adapter folder (its base is probed), or a hub id. A published
            Qwen3.5 size that is neither cached nor reachable comes from the built-in catalogue (logged).
        revision: of a hub id.

    Raises:
        UsageError: no such model, or a config that describes none.
        PreflightError: the hub is not reachable and the config is not cached.
    """
    folder = _local_folder(source)
    if folder is None:
        return _hub_spec(source, revision)
    if is_adapter_folder(folder):
        return probe(adapter_base(folder))
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--model {source} should hold config.json (a model) or adapter_config.json (a PEFT adapter); "
            "it holds neither."
        )
    return spec_from_config(_read_json(folder / "config.json"), source)


def resolve_model_dir(source: str, revision: str | None = None) -> Path:
    """Returns the folder that holds the weights; downloads a hub id's safetensors, JSON, text and templates.

    Args:
        source: a local folder (returned as it is; an adapter folder leads to its base) or a hub id.
        revision: of a hub id.

    Raises:
        UsageError: no such folder, no such model.
        PreflightError: not cached and not reachable, or the disk refused.
    """
    folder = _local_folder(source)
    if folder is not None:
        return resolve_model_dir(adapter_base(folder)) if is_adapter_folder(folder) else folder
    if _hub_file(source, "config.json", revision) is None:
        adapter = _hub_file(source, "adapter_config.json", revision)
        if adapter is None:
            raise UsageError(f"--model {source} has neither config.json nor adapter_config.json on the hub.")
        return resolve_model_dir(adapter_base(adapter.parent))
    import huggingface_hub
    from huggingface_hub import errors

    try:
        path = huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(DOWNLOAD_PATTERNS))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise PreflightError(
            f"The weights of {source} could not be fetched ({type(error).__name__}: {error}). Check network and disk, "
            "or give --model a folder that holds the model."
        ) from error
    return Path(path)


def _wrong(source: str, key: str, wanted: str, value: Any) -> UsageError:
    return UsageError(
        f"config.json of {source} should give `{key}` as {wanted}; it gives {reprlib.repr(value)}. "
        "Only causal language models in the transformers format can be trained."
    )


def _integer(
    config: dict[str, Any], key: str, source: str, default: int | None = None, most: int = _LARGEST_SIZE
) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _wrong(source, key, f"a whole number up to {most}", value)
    return value


def _number(config: dict[str, Any], key: str, source: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
        raise _wrong(source, key, "a number", value)
    return float(value)


def _mapping(config: dict[str, Any], key: str, source: str) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise _wrong(source, key, "an object", value)
    return value or {}


def _tied(config: dict[str, Any], text: dict[str, Any]) -> bool:
    """A multimodal class obeys the outer config; where it is silent, the text config speaks."""
    value = config.get("tie_word_embeddings")
    return bool(text.get("tie_word_embeddings", False) if value is None else value)


def _rope(
    text: dict[str, Any], family: str, kinds: list[LayerKind], source: str
) -> tuple[float, float, dict[str, Any] | None, str]:
    """Returns theta, the partial factor, scaling parameters and an objection, from any of transformers' spellings."""
    params = {**_mapping(text, "rope_parameters", source), **_mapping(text, "rope_scaling", source)}
    objection = ""
    if params and set(params) <= set(_LAYER_KINDS):
        used = [_mapping(params, k, source) for k in params if k in kinds] or [
            _mapping(params, k, source) for k in params
        ]
        if any(p != used[0] for p in used):
            objection = "its layers use different rotary embeddings"
        params = dict(used[0])
    theta = _number(params, "rope_theta", source, 0) or _number(text, "rope_theta", source, 0) or 10000.0
    partial = _number(params, "partial_rotary_factor", source, 0) or _number(text, "partial_rotary_factor", source, 0)
    partial = partial or (0.25 if family == "qwen3_5_text" else 1.0)
    kind = params.get("rope_type", params.get("type")) or "default"
    if kind in ("default", "mrope"):
        return theta, partial, None, objection
    if kind == "linear":
        return theta, partial, {"rope_type": "linear", "factor": _number(params, "factor", source, 1.0)}, objection
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        if all(k in params for k in keys):
            position = "original_max_position_embeddings"
            original = _integer(params, position, source, 0) or text.get("max_position_embeddings")
            scaling: dict[str, Any] = {"rope_type": "llama3", **{k: _number(params, k, source, 1.0) for k in keys}}
            return theta, partial, {**scaling, position: original}, objection
    return theta, partial, None, f"its rotary embedding is of type {reprlib.repr(kind)}"


def _layer_kinds(
    text: dict[str, Any], family: str, layers: int, source: str
) -> tuple[list[LayerKind], int | None, str]:
    """Returns each layer's kind, the sliding window and an objection, as each family's class reads its config."""
    window: int | None = _integer(text, "sliding_window", source, 0) or None
    given = text.get("layer_types")
    if given is not None and (not isinstance(given, list) or not all(isinstance(kind, str) for kind in given)):
        raise _wrong(source, "layer_types", "a list of names", given)
    kinds: list[Any]
    if family == "mistral":
        return ["sliding_attention" if window else "full_attention"] * layers, window, ""
    if family in ("qwen2", "qwen3"):
        window = window if text.get("use_sliding_window", False) else None
        first = _integer(text, "max_window_layers", source, 28)
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
        kinds = kinds if given is None else given
    elif family == "qwen3_5_text":
        interval = _integer(text, "full_attention_interval", source, 4) or 1
        kinds = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
        kinds = kinds if given is None else given
    else:
        kinds = ["full_attention"] * layers if given is None or family == "llama" else given
    if len(kinds) != layers:
        raise UsageError(f"config.json of {source} lists {len(kinds)} layer_types for {layers} layers.")
    unknown = sorted(set(kinds) - set(_LAYER_KINDS))
    known: list[LayerKind] = ["full_attention" if k in unknown else k for k in kinds]
    if "sliding_attention" in known and not window:
        return known, None, "it has sliding_attention layers without a sliding_window"
    objection = f"its layers are of kind {reprlib.repr(unknown[0])}" if unknown else ""
    return known, window if "sliding_attention" in known else None, objection


def _objections(config: dict[str, Any], text: dict[str, Any], family: str) -> list[str]:
    """Reasons why the native engine cannot train this model."""
    outer = config.get("model_type")
    if family not in NATIVE_FAMILIES or (text is not config and outer != "qwen3_5"):
        name = family if text is config else outer
        return [f"its architecture {name!r} is not one of {', '.join(NATIVE_FAMILIES)}"]
    found = []
    if (act := text.get("hidden_act", "silu")) not in ("silu", "swish"):
        found.append(f"its activation is {reprlib.repr(act)}")
    if config.get("quantization_config") or text.get("quantization_config"):
        found.append("its weights are quantised")
    if family == "qwen3_5_text" and text.get("attn_output_gate", True) is False:
        found.append("its attention has no output gate")
    return found


def _gdn(text: dict[str, Any], source: str) -> dict[str, int]:
    defaults = {
        "gdn_key_heads": ("linear_num_key_heads", 16), "gdn_value_heads": ("linear_num_value_heads", 32),
        "gdn_key_dim": ("linear_key_head_dim", 128), "gdn_value_dim": ("linear_value_head_dim", 128),
        "gdn_conv_kernel": ("linear_conv_kernel_dim", 4),
    }
    return {field: _integer(text, key, source, default) for field, (key, default) in defaults.items()}


def _expert_parameters(text: dict[str, Any], spec: ModelSpec) -> int:
    """Estimate of what a mixture of experts adds to the dense count (unknown architectures only)."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for n in (_integer(text, name, spec.source, 0) for name in names) if n), 0)
    ffn = _integer(text, "moe_intermediate_size", spec.source, 0) or spec.intermediate_size
    return max(0, experts * ffn - spec.intermediate_size) * 3 * spec.hidden_size * spec.num_layers


def spec_from_config(config: dict[str, Any], source: str) -> ModelSpec:
    """Returns the ModelSpec of a parsed config.json.

    Args:
        config: the whole file; a multimodal one holds the tower's under `text_config`.
        source: what messages call the model.

    Raises:
        UsageError: the config describes no causal language model.
    """
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    family = text.get("model_type") or config.get("model_type")
    if not isinstance(family, str) or not family:
        raise UsageError(f"config.json of {source} should name its `model_type`; it does not: no transformers model.")
    layers = _integer(text, "num_hidden_layers", source, most=_MOST_LAYERS)
    heads = _integer(text, "num_attention_heads", source)
    hidden = _integer(text, "hidden_size", source)
    own_head_dim = {"qwen3_5_text": 256, "qwen3": 128}.get(family, hidden // max(heads, 1))
    head_dim = _integer(text, "head_dim", source, own_head_dim)
    kinds, window, kind_objection = _layer_kinds(text, family, layers, source)
    theta, partial, scaling, rope_objection = _rope(text, family, kinds, source)
    objections = [*_objections(config, text, family), *(o for o in (kind_objection, rope_objection) if o)]
    hybrid = family == "qwen3_5_text"
    bias = family == "qwen2" or (family != "mistral" and bool(text.get("attention_bias", False)))

    mtp = "mtp_num_hidden_layers"
    spec = ModelSpec(
        source=source, model_type=family, multimodal=text is not config, native=not objections,
        native_reason="; ".join(objections),
        vocab_size=_integer(text, "vocab_size", source), hidden_size=hidden,
        intermediate_size=_integer(text, "intermediate_size", source, 4 * hidden), num_layers=layers, num_heads=heads,
        num_kv_heads=_integer(text, "num_key_value_heads", source, heads), head_dim=head_dim,
        layer_types=kinds, sliding_window=window,
        tie_word_embeddings=_tied(config, text), norm_eps=_number(text, "rms_norm_eps", source, 1e-6),
        zero_centred_norm=hybrid, attention_bias=bias,
        attention_output_bias=bias and family != "qwen2",
        mlp_bias=family == "llama" and bool(text.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_5_text"), attention_gate=hybrid,
        rope_theta=theta, rope_dim=int(head_dim * partial), rope_scaling=scaling,
        **(_gdn(text, source) if "linear_attention" in kinds else {}),
        mtp_layers=_integer(text, mtp, source, _integer(config, mtp, source, 0, _MOST_LAYERS), _MOST_LAYERS),
        max_position_embeddings=_integer(text, "max_position_embeddings", source, 0), parameters=0,
    )
    count = 0
    for shape in text_tower_shapes(spec).values():
        size = 1
        for n in shape:
            size *= n
        count += size
    count += 0 if family in NATIVE_FAMILIES else _expert_parameters(text, spec)
    return spec.model_copy(update={"parameters": count})
