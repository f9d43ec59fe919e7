"""TRL's SFTTrainer, one document at a time: its training_step is called, its loop, optimiser and data loader are not.

Unsloth does much of its work by patching the Trainer's methods and SFTTrainer's construction, so a document goes
through both, as in anybody's run with Unsloth.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparktune.setup.plan.schema import Plan

__all__ = ["SFT_SETTINGS", "document_inputs", "document_trainer"]

SFT_SETTINGS: Mapping[str, Any] = {
    "packing": False, "padding_free": False, "dataset_kwargs": {"skip_prepare_dataset": True},
}
"""What SFTConfig has beyond TrainingArguments, and is not left to its default."""


def document_inputs(ids: torch.Tensor, labels: torch.Tensor, supervised: int) -> dict[str, Any]:
    """Returns what a trainer of `document_trainer` takes as one batch.

    Args:
        ids: [1, L].
        labels: [1, L], not shifted.
        supervised: labels that count.
    """
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "supervised": supervised}


def document_trainer(
    model: nn.Module, processing: Any, plan: Plan, folder: Path, *, base: Any, config: Any, data: Any,
    settings: Mapping[str, Any], checkpointing: bool,
) -> Any:
    """Returns a trainer whose training_step(model, document_inputs(...), n) adds the gradients of sum(loss) / n.

    It returns that share of the loss; compute_loss returns the same without gradients' being added.

    Args:
        model: takes input_ids, attention_mask and labels; returns an object with the mean loss.
        processing: the model's tokenizer or processor.
        plan: complete.
        folder: for the trainer, which makes it and leaves it empty.
        base: trl.SFTTrainer as Unsloth left it, or transformers.Trainer.
        config: that class's arguments.
        data: a dataset of one row, which is looked at and not trained on.
        settings: arguments that only `config` has.
        checkpointing: whether the model computes anything again.
    """

    class DocumentTrainer(base):
        """Counts a document's own targets, so that it does not matter whether a model heeds num_items_in_batch."""

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
            num_items_in_batch: torch.Tensor | int | None = None,
        ) -> Any:
            supervised = inputs.pop("supervised")
            own = torch.full((), supervised, device=inputs["labels"].device)  # a tensor, as a Trainer gives it
            # A Trainer's loop has accelerate wrap the model in this; its backward pass lies outside.
            with self.accelerator.autocast():
                found = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=own)
            share = supervised / (supervised if num_items_in_batch is None else num_items_in_batch)
            return (found[0] * share, found[1]) if return_outputs else found * share

    on_gpu = next(model.parameters()).is_cuda
    arguments = config(
        output_dir=str(folder), per_device_train_batch_size=1, gradient_accumulation_steps=1, seed=plan.seed,
        bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=checkpointing, average_tokens_across_devices=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        **settings,
    )
    made = DocumentTrainer(model=model, args=arguments, train_dataset=data, processing_class=processing)
    made.current_gradient_accumulation_steps = 1  # set by the loop, and divided by where a model heeds no counts
    return made
