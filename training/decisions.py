"""What is decided before a model is built: device, engine, every value left open, and what is refused."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch

from sparktune.setup.data.tokenise import PreparedData
from sparktune.setup.plan.basestorage import base_storage, check_base_storage
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.models import NATIVE_FAMILIES, is_adapter_folder
from sparktune.setup.plan.recommend import apply, recommend
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.plan.trainable import TORCH_OPTIMIZERS
from sparktune.training.adapters import read_adapter_config
from sparktune.training.distributed import Members
from sparktune.training.engine_choice import Choice
from sparktune.training.memory import check_recompute_layers, choose_recompute, measure_machine
from sparktune.training.narrator import Narrator
from sparktune.training.quantised import import_bitsandbytes

__all__ = ["as_adapter_says", "decide_plan", "device_of", "maths_of", "refuse_unsupported", "with_engine"]

_MATHS = (
    "model", "mode", "engine", "seed", "pack", "pack_length", "num_epochs", "max_steps", "per_device_batch_size",
    "gradient_accumulation", "learning_rate", "lr_scheduler", "warmup_ratio", "warmup_steps", "optimizer",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm", "lora_r", "lora_alpha", "lora_dropout",
    "use_rslora", "target_modules", "quantise_base", "double_quantise", "dtype", "device",
)
"""Plan fields that change the numbers. What shapes the data is in the token cache's key, stored beside them."""


def device_of(plan: Plan, members: Members | None = None) -> torch.device:
    """Returns the device that trains: of several ranks of a machine, each has the GPU of its local rank.

    Raises:
        PreflightError: a GPU was asked for and torch sees none, or fewer than there are ranks.
    """
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise PreflightError(
            "--device cuda needs a CUDA GPU and a CUDA build of torch; torch "
            f"{importlib.metadata.version('torch')} sees none. Use --device cpu, or mend the installation."
        )
    if plan.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, there = members.local_rank if members else 0, torch.cuda.device_count()
    if local >= there:
        raise PreflightError(
            f"Every rank needs a GPU of its own, but this machine was given {local + 1} or more ranks and torch sees "
            f"{there} GPUs. Start {there} (--gpus {there}, or torchrun --nproc-per-node {there})."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def decide_plan(plan: Plan, spec: ModelSpec, data: PreparedData, device: torch.device, events: Narrator) -> Plan:
    """Fills every open value and says each choice once."""
    still_open = {name for name in Plan.model_fields if getattr(plan, name) in (None, "auto")}
    origins = {name: "default" if name in still_open else origin for name, origin in plan.origins.items()}
    plan = plan.model_copy(update={"origins": origins})
    found = recommend(plan, spec, data.report, measure_machine(device))
    for item in found:
        events.choice(item.field, str(item.value), f"{item.reason}; {item.source}")
    plan = apply(plan, found)
    policy, layers, reason = choose_recompute(plan, spec, data.report, measure_machine(device))
    if plan.recompute == "auto":
        events.choice("recompute", policy if layers is None else f"{policy}, {layers} layers", reason)
    return plan.model_copy(update={
        "recompute": policy,
        "recompute_layers": layers,
        "engine": "native" if plan.engine == "auto" and spec.native else plan.engine,
        "gradient_accumulation": plan.gradient_accumulation or 1,
    })


def as_adapter_says(plan: Plan) -> Plan:
    """A model that is an adapter brings rank, scale and targets with it; flags that say otherwise are refused."""
    folder = Path(plan.model)
    if not is_adapter_folder(folder):
        return plan
    if plan.mode == "full":
        raise UsageError(f"--mode full cannot train the adapter {folder}. Merge it into its base first, or use lora.")
    config = read_adapter_config(folder)
    own: dict[str, Any] = {
        "mode": "qlora" if plan.mode == "qlora" else "lora", "lora_r": config.r, "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": None if config.target_modules is None else list(config.target_modules),
    }
    for field, value in own.items():
        seen = getattr(plan, field)
        if plan.origins.get(field, "default") != "default" and seen not in ("auto", value):
            raise UsageError(
                f"{flag_of(field)} {seen} contradicts the adapter {folder}, whose {field} is {value}. Leave it out to "
                "go on with that adapter, or give its base as --model to start a new one."
            )
    return plan.model_copy(update={**own, "origins": {**plan.origins, **dict.fromkeys(own, "saved")}})


def with_engine(plan: Plan, choice: Choice | None, events: Narrator) -> Plan:
    """Settles an open engine as the process has already decided, for Unsloth patches what is imported after it."""
    if plan.engine != "auto" or choice is None:
        return plan
    events.choice("engine", choice.engine, choice.reason)
    return plan.model_copy(
        update={"engine": choice.engine, "origins": {**plan.origins, "engine": "recommendation"}}
    )


def refuse_unsupported(plan: Plan, spec: ModelSpec, device: torch.device) -> None:
    """Refuses what this version cannot train, in one sentence each."""
    check_base_storage(plan)
    check_recompute_layers(plan, spec)
    if plan.engine == "unsloth":
        if device.type != "cuda":
            raise PreflightError(
                "--engine unsloth needs the Unsloth engine, which runs on a CUDA GPU only; torch sees none. Use "
                "--engine native, which also trains on a CPU."
            )
    elif not spec.native:
        raise PreflightError(
            f"{plan.model} cannot be trained natively: {spec.native_reason}. The native engine trains "
            f"{', '.join(NATIVE_FAMILIES)}; other models need --engine unsloth and a CUDA GPU."
        )
    elif base_storage(plan) == "nf4":
        import_bitsandbytes("A base in nf4", "--quantise-base int8, which needs no package, or --mode lora")
    if plan.optimizer not in TORCH_OPTIMIZERS:
        if device.type == "cpu":
            raise PreflightError(
                f"--optimizer {plan.optimizer} needs a CUDA GPU: bitsandbytes has no CPU kernels for its optimisers, "
                "and torch sees no GPU here. Use --optimizer adamw."
            )
        import_bitsandbytes(f"--optimizer {plan.optimizer}", "--optimizer adamw")


def maths_of(plan: Plan, data: PreparedData) -> dict[str, Any]:
    """Returns what a checkpoint must agree with: all that changes the numbers."""
    values = plan.model_dump(mode="json", include=set(_MATHS))
    return {**values, "training data (file, split, tokenizer, template)": data.train.key}
