"""The published YAML template (`model:`, `adapter:`, `training:`, `dataset:` sections), read into plan fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.untrusted import excerpt

__all__ = ["SECTIONS", "read_template"]

SECTIONS: dict[str, dict[str, str | None]] = {
    "model": {
        "base_id": "model", "max_seq_length": "max_seq_length", "quantization": "mode", "dtype": "dtype",
    },
    "adapter": {
        "rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules",
    },
    "training": {
        "epochs": "num_epochs", "batch_size": "per_device_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation", "learning_rate": "learning_rate",
        "scheduler": "lr_scheduler", "optimizer": "optimizer", "warmup_steps": "warmup_steps",
        "weight_decay": "weight_decay", "gradient_checkpointing": "recompute", "seed": "seed",
        "max_steps": "max_steps", "save_steps": "save_steps",
    },
    "dataset": {
        "path": "data", "text_field": "text_field", "packing": "pack", "remove_unused_columns": None,
    },
}
"""Section -> key -> plan field; None for a key that is accepted and has no effect."""


def _quantization(path: Path, value: Any, notes: list[str]) -> str | None:
    if value == "nf4":
        return "qlora"
    if value is False or (isinstance(value, str) and value.lower() in ("none", "no", "false")):
        return None
    raise UsageError(
        f"--config {path}: `model.quantization` takes nf4 (4-bit base, mode qlora) or none; got {excerpt(value)}."
    )


def _dtype(path: Path, value: Any, notes: list[str]) -> Any:
    if value == "float16":
        notes.append(
            f"--config {path}: `model.dtype: float16` is read as bfloat16: same size, and no loss scaling is needed."
        )
        return "bfloat16"
    return value


def _checkpointing(path: Path, value: Any, notes: list[str]) -> Any:
    if value == "unsloth":
        notes.append(
            f"--config {path}: `training.gradient_checkpointing: unsloth` is read as --recompute auto: "
            "as much is computed again as the memory asks for."
        )
        return "auto"
    if isinstance(value, bool):
        return "layer" if value else "none"
    return value


_TRANSLATE = {
    ("model", "quantization"): _quantization,
    ("model", "dtype"): _dtype,
    ("training", "gradient_checkpointing"): _checkpointing,
}


def read_template(
    path: Path, section: str, content: dict[Any, Any], notes: list[str], unknown: list[str]
) -> Iterator[tuple[str, str, Any]]:
    """Yields (plan field, key as written, value) for one section.

    Args:
        path: the file, for messages.
        section: a key of SECTIONS.
        content: what stands under it; empty values are left out.
        notes: receives one sentence for each key without effect or read differently.
        unknown: receives the full names of unknown keys.

    Raises:
        UsageError: a value that has no counterpart here.
    """
    for key, value in content.items():
        name = f"{section}.{key if isinstance(key, str) else excerpt(key)}"
        if key not in SECTIONS[section]:
            unknown.append(name)
            continue
        field = SECTIONS[section][key]
        if field is None:
            notes.append(f"--config {path}: `{name}` is accepted and has no effect here.")
            continue
        translate = _TRANSLATE.get((section, key))
        if translate is not None and value is not None:
            value = translate(path, value, notes)
        if value is not None:
            yield field, name, value
