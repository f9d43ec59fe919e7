"""The Unsloth engine: Unsloth's FastModel in TRL's SFTTrainer, behind our Engine protocol.

A document's loss and gradients come from SFTTrainer.training_step as Unsloth patches it; accumulation, clipping, AdamW,
the schedule, data and checkpoints are ours. One document a row: packed rows leak across documents in hybrid models, and
Unsloth itself leaves packing off for models with a vision tower, which Qwen3.5's checkpoints have.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparktune.setup.plan.basestorage import base_storage
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.models import is_adapter_folder
from sparktune.setup.plan.outfolder import build_folder
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.setup.plan.weights import safetensors_index
from sparktune.training.adapters import default_targets
from sparktune.training.batch import IGNORE_INDEX, MicroBatch
from sparktune.training.engine_choice import load_unsloth
from sparktune.training.optimiser import MasterAdamW
from sparktune.training.unsloth_trainer import SFT_SETTINGS, document_inputs, document_trainer

__all__ = ["UnslothEngine", "adapter_key", "documents_of"]

_KEY = "base_model.model."


def documents_of(batch: MicroBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yields (ids [1, L], labels [1, L], supervised tokens) of every document that teaches something.

    Labels are not shifted, as transformers wants them: the model shifts them itself.
    """
    labels = torch.full_like(batch.ids, IGNORE_INDEX)
    # target[t] is ids[t + 1] of the same document, so t + 1 never crosses a boundary
    labels[batch.supervised_rows + 1] = batch.targets
    bounds = batch.cu_seqlens_cpu.tolist()
    rows = batch.supervised_rows.cpu()
    owner = torch.bucketize(rows, batch.cu_seqlens_cpu[1:].long(), right=True)
    per_document = torch.bincount(owner, minlength=len(bounds) - 1).tolist()
    for i, supervised in enumerate(per_document):
        if supervised:
            span = slice(bounds[i], bounds[i + 1])
            yield batch.ids[span][None], labels[span][None], supervised


def adapter_key(name: str, layout: str) -> str | None:
    """Returns the key in an adapter file of a PEFT parameter's name; None for a parameter that is not LoRA's.

    Args:
        name: for example base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight.
        layout: text or multimodal, the base's naming.
    """
    parts = name.split(".")
    if len(parts) < 4 or parts[-3] not in ("lora_A", "lora_B") or parts[-1] != "weight":
        return None
    module = ".".join(parts[:-3]).removeprefix(_KEY).replace("model.language_model.", "model.", 1)
    if layout == "multimodal":
        module = module.replace("model.", "model.language_model.", 1)
    return f"{_KEY}{module}.{parts[-3]}.weight"


class UnslothEngine:
    """A transformers model that Unsloth made (training/engine.py says what the methods mean).

    Args:
        trainer: from `document_trainer`, around that model.
        plan: complete.
        spec: the base's.
        model_dir: the base's folder, for the names of trained weights.
        switch: Unsloth's FastModel, whose for_inference and for_training surround generation; None without.

    Attributes:
        checkpointing: what Unsloth computes again in the backward pass: "unsloth" (whole layers) or False (nothing).
    """

    def __init__(self, trainer: Any, plan: Plan, spec: ModelSpec, model_dir: Path, switch: Any = None) -> None:
        self.model, self.plan, self.spec, self._model_dir, self._switch = trainer.model, plan, spec, model_dir, switch
        self._trainer = trainer
        learning = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.device = learning[0][1].device
        self.checkpointing = _checkpointing(plan)
        self._optimiser = MasterAdamW(
            learning, betas=(plan.adam_beta1, plan.adam_beta2), eps=plan.adam_eps, weight_decay=plan.weight_decay,
            max_grad_norm=plan.max_grad_norm, optimizer=plan.optimizer,
        )
        self._to_training()

    def _to_training(self) -> None:
        if self._switch is not None:
            # Left out, it would turn checkpointing on in every module, whatever the plan says.
            self._switch.for_training(self.model, use_gradient_checkpointing=self.checkpointing)
        self.model.train()

    @classmethod
    def build(cls, plan: Plan, spec: ModelSpec, model_dir: Path, device: torch.device) -> UnslothEngine:
        """Loads the model through Unsloth's FastModel: LoRA, LoRA on a 4-bit base, or everything.

        Args:
            plan: complete; `model` is a base, not an adapter.
            spec: the base model's.
            model_dir: the base model's folder.
            device: a CUDA device.

        Raises:
            PreflightError: no GPU, no unsloth, or a GPU without bfloat16.
            UsageError: the plan goes on from an adapter.
        """
        if device.type != "cuda":
            raise PreflightError(
                "--engine unsloth needs a CUDA GPU; torch sees none here. Use --engine native, which also trains on a "
                "CPU."
            )
        if not torch.cuda.is_bf16_supported():
            raise PreflightError("The Unsloth engine computes in bfloat16, which this GPU does not have.")
        if is_adapter_folder(Path(plan.model)):
            raise UsageError(
                f"--engine unsloth starts new adapters; it cannot go on with {plan.model}. Use --engine native."
            )
        fast = load_unsloth().FastModel
        full, storage = plan.mode == "full", base_storage(plan)
        model, processing = fast.from_pretrained(
            str(model_dir), max_seq_length=plan.max_seq_length, dtype=torch.bfloat16, load_in_4bit=storage == "nf4",
            load_in_8bit=storage == "int8", full_finetuning=full, use_gradient_checkpointing=_checkpointing(plan),
            random_state=plan.seed,
        )
        if full:
            for name, parameter in model.named_parameters():
                if "visual." in name:
                    parameter.requires_grad_(False)  # text data never reaches it
        else:
            model = fast.get_peft_model(
                model, r=plan.lora_r, lora_alpha=plan.lora_alpha if plan.lora_alpha is not None else plan.lora_r,
                lora_dropout=plan.lora_dropout, bias="none", use_rslora=plan.use_rslora,
                target_modules=plan.target_modules or list(default_targets(spec)), random_state=plan.seed,
                use_gradient_checkpointing=_checkpointing(plan),
            )
        trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")  # as Unsloth patched them
        with tempfile.TemporaryDirectory() as folder:
            trainer = document_trainer(
                model, processing, plan, Path(folder), base=trl.SFTTrainer, config=trl.SFTConfig,
                data=datasets.Dataset.from_dict({"input_ids": [[0, 1]], "labels": [[0, 1]]}),
                settings={**SFT_SETTINGS, "max_length": plan.max_seq_length},
                checkpointing=bool(_checkpointing(plan)),
            )
        return cls(trainer, plan, spec, model_dir, fast)

    @property
    def reasons(self) -> dict[str, str]:
        """What computes."""
        versions = ", ".join(f"{name} {_version(name)}" for name in ("trl", "transformers"))
        return {"model": f"unsloth {_version('unsloth')} on {versions}"}

    def describe(self) -> str:
        """Returns what learns, in words."""
        learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return (
            f"Unsloth engine: {learning:,} parameters learn; packing is off{' (--pack has no effect)' * self.plan.pack}"
            ": one document a row, because rows of several documents leak across them in hybrid models; checkpointing "
            f"{'as Unsloth does it' if self.checkpointing else 'off'}"
        )

    def forward_backward(self, micro_batches: Sequence[MicroBatch], n_supervised: int) -> torch.Tensor:
        """Adds the gradients of sum(cross-entropy) / n_supervised, a document at a time."""
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch in micro_batches:
            for document in documents_of(batch.to(self.device)):
                loss = self._trainer.training_step(self.model, document_inputs(*document), n_supervised)
                total += loss.detach().float()
        return total

    def gradient_norm(self) -> torch.Tensor:
        """Returns the global norm of the gradients."""
        return self._optimiser.norm()

    def optimiser_step(self, learning_rate: float) -> torch.Tensor:
        """Clips, steps and zeroes the gradients; returns their norm before clipping."""
        return self._optimiser.step(learning_rate)

    def drop_gradients(self) -> None:
        """Forgets the gradients since the last optimiser step."""
        self._optimiser.drop_gradients()

    def recompute_more(self) -> None:
        """Unsloth's checkpointing is set when the model is loaded: there is nothing to give up here."""
        self._optimiser.drop_gradients()

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yields (parameter name, gradient since the last step or None)."""
        return self._optimiser.named_gradients()

    @torch.no_grad()
    def loss_sum(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Returns sum(cross-entropy) of one micro-batch, dropout off."""
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        self.model.eval()
        try:
            for document in documents_of(micro_batch.to(self.device)):
                inputs = document_inputs(*document)
                total += self._trainer.compute_loss(self.model, inputs, num_items_in_batch=1).float()
        finally:
            self.model.train()
        return total

    @torch.no_grad()
    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """Returns the greedy continuation, the stop token included if met."""
        ids = torch.tensor([list(prompt_ids)], device=self.device)
        self.model.eval()
        if self._switch is not None:
            self._switch.for_inference(self.model)
        try:
            with self._trainer.accelerator.autocast():
                made = self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                    do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0] if stop_ids else 0,
                    use_cache=True,
                )
        finally:
            self._to_training()
        return made[0, ids.shape[1] :].tolist()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns masters, moments and step counts; dropout draws from torch's generator, which checkpoints keep."""
        return self._optimiser.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restores `state()` exactly. Raises ValueError naming what does not fit."""
        self._optimiser.load_state(state)

    def export(self, folder: Path) -> None:
        """Makes `folder` with the adapter in PEFT's format, or the trained tensors under the base's names."""
        masters = self._optimiser.masters()
        if self.plan.mode == "full":
            self._export_weights(folder, masters)
        else:
            self._export_adapter(folder, masters)

    def _export_adapter(self, folder: Path, masters: Mapping[str, torch.Tensor]) -> None:
        plan, tensors = self.plan, {}
        if plan.layout == "multimodal" and not self.spec.multimodal:
            raise UsageError(f"--layout multimodal needs a multimodal base; {plan.model} is a text model.")
        for name, value in masters.items():
            key = adapter_key(name, plan.layout)
            if key is None:
                raise UsageError(f"The adapter holds {name}, which is no LoRA matrix; it cannot be written as one.")
            tensors[key] = value.detach().to("cpu", torch.float32).contiguous().clone()
        assert plan.lora_r is not None, "resolved before the model is built"
        described = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": plan.model,
            "inference_mode": True, "r": plan.lora_r,
            "lora_alpha": plan.lora_alpha if plan.lora_alpha is not None else plan.lora_r,
            "lora_dropout": plan.lora_dropout, "use_rslora": plan.use_rslora,
            "target_modules": sorted({key.split(".")[-3] for key in tensors}), "bias": "none",
            "fan_in_fan_out": False, "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
        }
        with build_folder(
            folder, needs_bytes=sum(t.nbytes for t in tensors.values()), what="The adapter",
            replace=lambda path: (path / "adapter_config.json").is_file(),
        ) as partial:
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            (partial / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def _export_weights(self, folder: Path, masters: Mapping[str, torch.Tensor]) -> None:
        known = safetensors_index(self._model_dir)
        strange = [name for name in masters if name not in known]
        if strange:
            raise PreflightError(
                f"Unsloth trained tensors that {self._model_dir} does not have under their names: "
                f"{', '.join(strange[:5])}. They cannot be merged; use --engine native."
            )
        tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in masters.items()}
        with build_folder(
            folder, needs_bytes=sum(t.nbytes for t in tensors.values()), what="The trained weights",
            replace=lambda _: True,
        ) as partial:
            save_file(tensors, partial / "trained-00001.safetensors", metadata={"format": "pt"})


def _checkpointing(plan: Plan) -> str | bool:
    return False if plan.recompute in ("none", "norms") else "unsloth"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of no recorded version"
