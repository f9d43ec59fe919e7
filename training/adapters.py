"""LoRA adapters: which projections get one, and PEFT's folder format both ways.

Keys are those that PEFT makes on `AutoModelForCausalLM` (text layout) or on the multimodal class (multimodal layout).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparktune.kernels.modules.projection import ProjectionGroup
from sparktune.kernels.modules.static_lora import StaticLoRA
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.outfolder import build_folder
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.weights import safetensors_header
from sparktune.training.tower import TextTower

__all__ = [
    "LoraConfig", "adapter_modules", "attach_lora", "default_targets", "load_adapter", "named_adapters",
    "read_adapter_config", "resolve_targets", "save_adapter",
]

Layout = Literal["text", "multimodal"]
_DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GDN = ("in_proj_qkv", "in_proj_z", "out_proj")
_SMALL_GDN = ("in_proj_b", "in_proj_a")
_KEY = "base_model.model."
_FILE = "adapter_model.safetensors"
# Adapter kinds that compute something else than base + scale * B A; training one as LoRA would be silently wrong.
_UNSUPPORTED = (
    "use_dora", "use_qalora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "alora_invocation_tokens", "arrow_config", "target_parameters", "trainable_token_indices", "megatron_config",
    "use_bdlora", "layer_replication", "eva_config", "corda_config",
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What PEFT calls LoraConfig, as far as the native engine goes."""

    r: int
    """Rank."""
    alpha: float
    dropout: float = 0.0
    """On the adapters' input; one mask for the projections of a group."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    target_modules: tuple[str, ...] | None = None
    """Last names of the projections; every large projection of the model when None."""

    @property
    def scale(self) -> float:
        """Factor on B A x."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def default_targets(spec: ModelSpec) -> tuple[str, ...]:
    """Returns every large projection: q, k, v, o, gate, up, down, and the GDN's qkv, z and out (a and b are tiny)."""
    dense = _DENSE if any(k != "linear_attention" for k in spec.layer_types) else _DENSE[4:]
    return dense + (_GDN if "linear_attention" in spec.layer_types else ())


def resolve_targets(spec: ModelSpec, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the projections to adapt, in the model's order.

    Raises:
        UsageError: a name the model does not have; the message lists those it has.
    """
    valid = default_targets(spec) + (_SMALL_GDN if "linear_attention" in spec.layer_types else ())
    if wanted is None:
        return default_targets(spec)
    unknown = [name for name in wanted if name not in valid]
    if unknown or not wanted:
        seen = ", ".join(unknown) if unknown else "an empty list"
        raise UsageError(
            f"--target-modules should name projections of {spec.source}: {', '.join(valid)}; seen: {seen}."
        )
    return tuple(name for name in valid if name in wanted)


def adapter_modules(model: TextTower, targets: Sequence[str]) -> list[str]:
    """Returns the full names (`model.layers.0.self_attn.q_proj`) of all projections whose last name is a target."""
    return [f"{prefix}.{name}" for prefix, _, _, group in model.groups() for name in group.names if name in targets]


def _attach(model: TextTower, config: LoraConfig, modules: Sequence[str]) -> None:
    chosen = set(modules)
    for index, (prefix, owner, attribute, group) in enumerate(list(model.groups())):
        adapted = [name for name in group.names if f"{prefix}.{name}" in chosen]
        if adapted:
            assert isinstance(group, ProjectionGroup), "adapters go on a frozen group, once"
            lora = StaticLoRA(
                group, adapted, r=config.r, scale=config.scale, dropout=config.dropout, index=index, ops=owner.ops
            )
            setattr(owner, attribute, lora)


def attach_lora(model: TextTower, config: LoraConfig, seed: int) -> list[str]:
    """Puts fresh adapters on the model's projections; only they are trainable.

    Args:
        model: frozen, filled or not.
        config: rank, alpha, targets.
        seed: of A's initialisation (B is zero) and of dropout.

    Returns:
        Full names of the adapted projections.

    Raises:
        UsageError: a target that the model does not have.
    """
    modules = adapter_modules(model, resolve_targets(model.spec, config.target_modules))
    _attach(model, config, modules)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, StaticLoRA):
            module.reset(generator)
    model.dropout_seed = seed
    return modules


def named_adapters(
    model: TextTower, values: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields (full name of the projection, A [r, in], B [out, r]), views of the parameters.

    Args:
        model: with adapters.
        values: parameter name -> tensor to look at instead of the parameter (a master, an average).
    """
    for path, module in model.named_modules():
        if isinstance(module, StaticLoRA):
            prefix = "model." + path.rpartition(".")[0]
            given = values or {}
            a = given.get(f"{path}.lora_a", module.lora_a)
            b = given.get(f"{path}.lora_b", module.lora_b)
            for name in module.adapted:
                yield f"{prefix}.{name}", *module.adapter_of(name, a, b)


def _peft_name(module: str, layout: Layout) -> str:
    return _KEY + (module.replace("model.", "model.language_model.", 1) if layout == "multimodal" else module)


def _own_name(key: str) -> tuple[str, str] | None:
    """Returns (projection in the text layout, "lora_A" or "lora_B") of a PEFT key, None for any other key."""
    parts = key.removeprefix(_KEY).split(".")
    if not key.startswith(_KEY) or len(parts) < 3 or parts[-1] != "weight":
        return None
    parts = parts[:-1]
    if parts[-1] == "default":
        parts = parts[:-1]
    if parts[-1] not in ("lora_A", "lora_B"):
        return None
    return ".".join(parts[:-1]).replace("model.language_model.", "model.", 1), parts[-1]


def save_adapter(
    model: TextTower, folder: Path, config: LoraConfig, base: str, layout: Layout = "text",
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes the adapters as a PEFT folder, whole or not at all; an adapter already there is replaced.

    Args:
        model: with adapters.
        folder: final name.
        config: as attached.
        base: folder or hub id of the base, written as `base_model_name_or_path`.
        layout: of the keys; `multimodal` needs a multimodal base.
        values: parameter name -> tensor to write instead of the parameter.

    Raises:
        UsageError: the multimodal layout of a model that has none.
        PreflightError, SparktuneError: the folder cannot be written or the disk is full.
    """
    if layout == "multimodal" and not model.spec.multimodal:
        raise UsageError(f"--layout multimodal needs a multimodal base; {base} is a text model. Use --layout text.")
    tensors = {}
    for module, a, b in named_adapters(model, values):
        name = _peft_name(module, layout)
        tensors[f"{name}.lora_A.weight"] = a.detach().to("cpu", torch.float32).contiguous().clone()
        tensors[f"{name}.lora_B.weight"] = b.detach().to("cpu", torch.float32).contiguous().clone()
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": config.r, "lora_alpha": alpha, "lora_dropout": config.dropout, "use_rslora": config.use_rslora,
        "target_modules": list(resolve_targets(model.spec, config.target_modules)), "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
    }
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with build_folder(folder, needs_bytes=size, what="The adapter", replace=_is_adapter) as partial:
        save_file(tensors, partial / _FILE, metadata={"format": "pt"})
        (partial / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def read_adapter_config(folder: Path) -> LoraConfig:
    """Returns the settings of a PEFT adapter folder.

    Raises:
        UsageError: unreadable, or not plain LoRA.
    """
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config.get("target_modules")
        dropout = float(config.get("lora_dropout") or 0.0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} should be a PEFT config with r and lora_alpha; it is not ({error!r}).") from error
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or used or config.get("bias", "none") != "none":
        seen = used or [f"peft_type {config.get('peft_type')!r}, bias {config.get('bias')!r}"]
        raise UsageError(
            f"{path} should describe plain LoRA; seen: {', '.join(seen)}. The native engine cannot go on from that: "
            "merge this adapter with PEFT first."
        )
    if config.get("init_lora_weights") not in (True, False, None, "gaussian"):
        raise UsageError(
            f"{path} says init_lora_weights {config['init_lora_weights']!r}, which changed the base's weights. "
            "Merge this adapter with PEFT first."
        )
    names = tuple(targets) if isinstance(targets, list) else None
    return LoraConfig(
        r=rank, alpha=alpha, dropout=dropout, use_rslora=bool(config.get("use_rslora", False)), target_modules=names
    )


def _pairs(path: Path) -> dict[str, dict[str, str]]:
    """Returns projection -> {"lora_A": key, "lora_B": key}; raises for other keys and for halves of a pair."""
    pairs: dict[str, dict[str, str]] = {}
    strange = []
    for key in safetensors_header(path):
        found = _own_name(key)
        if found is None:
            strange.append(key)
        else:
            pairs.setdefault(found[0], {})[found[1]] = key
    strange += [next(iter(p.values())) for p in pairs.values() if len(p) != 2]
    if strange or not pairs:
        raise UsageError(
            f"{path} should hold pairs of {_KEY}MODULE.lora_A.weight and .lora_B.weight; seen: "
            f"{', '.join(strange[:10]) if strange else 'no tensors'}. It is not a plain LoRA adapter."
        )
    return pairs


@torch.no_grad()
def load_adapter(model: TextTower, folder: Path) -> LoraConfig:
    """Puts a PEFT adapter's A and B on the model, attaching adapters on exactly its projections if there are none yet.

    Args:
        model: filled; without adapters, or with adapters on the same projections and of the same rank.
        folder: a PEFT LoRA folder, in the text or the multimodal layout.

    Returns:
        The adapter's config.

    Raises:
        UsageError: another kind of adapter, projections or shapes that are not this model's, or not those attached.
    """
    config = read_adapter_config(folder)
    path = folder / _FILE
    if not path.is_file():
        raise UsageError(f"{folder} should hold {_FILE}; it does not. Save the adapter with safetensors.")
    pairs = _pairs(path)
    known = {f"{prefix}.{name}" for prefix, _, _, group in model.groups() for name in group.names}
    unknown = sorted(pairs.keys() - known)
    if unknown:
        raise UsageError(
            f"{path} adapts {len(unknown)} modules that {model.spec.source} does not have, or that are not linear "
            f"projections of its text tower: {', '.join(unknown[:10])}. It belongs to another base."
        )
    if not any(isinstance(m, StaticLoRA) for m in model.modules()):
        _attach(model, config, list(pairs))
    places = {module: (a, b) for module, a, b in named_adapters(model)}
    if places.keys() != pairs.keys():
        other = sorted(places.keys() ^ pairs.keys())
        raise UsageError(
            f"{path} should adapt the same projections as the model; these differ: {', '.join(other[:10])}. "
            "Give the adapter's own --target-modules."
        )
    with safe_open(path, framework="pt") as file:
        for module, keys in pairs.items():
            for place, part in zip(places[module], ("lora_A", "lora_B"), strict=True):
                value = file.get_tensor(keys[part])
                if value.shape != place.shape:
                    raise UsageError(
                        f"{keys[part]} in {path} should be {list(place.shape)}; it is {list(value.shape)}. Rank and "
                        "base must be the adapter's own."
                    )
                place.copy_(value)
    return config
