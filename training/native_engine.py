"""The native engine: our own text tower, LoRA or full fine-tuning, AdamW over full-precision masters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch

from sparktune.kernels.select import OpTable, select_ops
from sparktune.setup.plan.basestorage import base_storage
from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.models import adapter_base, is_adapter_folder
from sparktune.setup.plan.schema import ModelSpec, Plan
from sparktune.training.adapters import LoraConfig, attach_lora, load_adapter, save_adapter
from sparktune.training.batch import MicroBatch
from sparktune.training.card import check_card
from sparktune.training.graphs import TowerGraphs
from sparktune.training.model import TextTower, build_model, export_weights, load_weights, train_everything
from sparktune.training.optimiser import MasterAdamW
from sparktune.training.quantised import build_hollow, frozen_parameters, stored_bytes, storing
from sparktune.training.tower import RecomputePolicy

__all__ = ["NativeEngine", "kernels_in_words"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_CALLS = "dropout.calls"


class NativeEngine:
    """A text tower that learns (training/engine.py says what the methods mean).

    Args:
        model: filled, with whatever learns set to require gradients.
        plan: the optimiser's settings.
        export: writes the result into a folder it makes, given the masters by parameter name.
        what: what learns, in words.
    """

    def __init__(
        self, model: TextTower, plan: Plan, export: Callable[[Path, dict[str, torch.Tensor]], None], what: str
    ) -> None:
        self.model = model
        self.device = model.device
        self._export = export
        self._what = what
        learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._optimiser = MasterAdamW(
            learning, betas=(plan.adam_beta1, plan.adam_beta2), eps=plan.adam_eps, weight_decay=plan.weight_decay,
            max_grad_norm=plan.max_grad_norm, optimizer=plan.optimizer,
        )
        self.graphs = TowerGraphs(
            model, self._optimiser.gradient_sums, 0.0 if plan.mode == "full" else plan.lora_dropout
        )
        # A graph adds to gradients at fixed addresses.
        self._optimiser.keep_gradients = not self.graphs.objection
        self._calls_before = model.dropout_calls
        self._dtypes = {name: p.dtype for name, p in model.named_parameters()}
        model.train()

    @classmethod
    def build(
        cls, plan: Plan, spec: ModelSpec, model_dir: Path, device: torch.device, ops: OpTable | None = None
    ) -> NativeEngine:
        """Builds, fills and prepares the model that a plan describes.

        Args:
            plan: complete; `model` may be a PEFT adapter folder, which then goes on learning.
            spec: the base model's.
            model_dir: the base model's folder.
            device: where it trains.
            ops: the implementations to use; selected for device and type when left out.

        Raises:
            PreflightError: the checkpoint is incomplete or of an unknown architecture, or the GPU cannot run the plan.
            UsageError: a target that the model does not have, or an adapter that does not fit.
        """
        dtype = _DTYPES[plan.dtype]
        check_card(device, dtype)
        ops, storage = ops or select_ops(device, dtype, spec), base_storage(plan)
        if storage == "none":
            model = build_model(spec, ops, dtype, device)
            load_weights(model, model_dir, spec)
        else:
            model = build_hollow(spec, ops, dtype, device)
            load_weights(model, model_dir, spec, storing(storage, plan.double_quantise))
        assert plan.recompute != "auto", "resolved before the model is built"
        model.set_recompute(plan.recompute, plan.recompute_layers)
        if plan.mode == "full":
            names = train_everything(model)
            model.dropout_seed = plan.seed
            return cls(
                model, plan, lambda folder, masters: export_weights(model, model_dir, folder, masters),
                f"full fine-tuning of {len(names)} tensors",
            )
        folder = Path(plan.model)
        if is_adapter_folder(folder):
            config, base = load_adapter(model, folder), adapter_base(folder)
            model.dropout_seed = plan.seed
            what = f"LoRA of rank {config.r}, going on from {folder}"
        else:
            assert plan.lora_r is not None, "resolved before the model is built"
            config = LoraConfig(
                r=plan.lora_r, alpha=plan.lora_alpha if plan.lora_alpha is not None else float(plan.lora_r),
                dropout=plan.lora_dropout, use_rslora=plan.use_rslora,
                target_modules=None if plan.target_modules is None else tuple(plan.target_modules),
            )
            modules = attach_lora(model, config, plan.seed)
            base, what = plan.model, f"LoRA of rank {config.r} on {len(modules)} projections"
        return cls(
            model, plan, lambda out, masters: save_adapter(model, out, config, base, plan.layout, masters), what
        )

    @property
    def reasons(self) -> dict[str, str]:
        """Op -> the implementation chosen and why."""
        return self.model.ops.reasons

    def describe(self) -> str:
        """Returns what learns and what it runs on, in words: whatever is slower than it could be, with its reason."""
        learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        frozen = frozen_parameters(self.model)
        total = sum(p.numel() for p in self.model.parameters()) + frozen
        said = f"{self._what}: {learning:,} of {total:,} parameters learn in {self.model.dtype}".replace("torch.", "")
        if frozen:
            said += f"; {frozen:,} frozen ones are quantised and take {stored_bytes(self.model) / 2**30:.2f} GiB"
        graphs = f"no CUDA graphs: {self.graphs.objection}" if self.graphs.objection else "CUDA graphs"
        return f"{said}; {kernels_in_words(self.model.ops)}; {graphs}"

    def forward_backward(self, micro_batches: Iterable[MicroBatch], n_supervised: int) -> torch.Tensor:
        """Adds the gradients of sum(cross-entropy) / n_supervised; nothing here waits for the device."""
        wide = torch.promote_types(self.model.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=self.device)
        for batch in micro_batches:
            if batch.supervised_tokens:
                total += self._pass(batch.to(self.device), n_supervised)
        return total

    def _pass(self, batch: MicroBatch, n_supervised: int) -> torch.Tensor:
        """One micro-batch: adds its gradients, returns its share of the loss."""
        graph = self.graphs.find(batch)
        if graph is None:
            loss = self.model.loss_sum(batch) / n_supervised
            loss.backward()
            return loss.detach()
        hidden = graph.forward(batch).detach().requires_grad_()
        loss = self.model.head_loss(hidden, batch) / n_supervised
        loss.backward()
        assert hidden.grad is not None, "the loss of a batch with targets depends on every supervised row"
        graph.backward(hidden.grad)
        return loss.detach()

    def gradient_norm(self) -> torch.Tensor:
        """Returns the global norm of the gradients."""
        return self._optimiser.norm()

    def optimiser_step(self, learning_rate: float) -> torch.Tensor:
        """Clips, steps and zeroes the gradients; returns their norm before clipping."""
        self._calls_before = self.model.dropout_calls
        return self._optimiser.step(learning_rate)

    def drop_gradients(self) -> None:
        """Forgets every pass since the last optimiser step."""
        self.model.dropout_calls = self._calls_before
        self._optimiser.drop_gradients()

    def recompute_more(self) -> str | None:
        """Forgets the passes and takes the next recompute policy: none, norms, layer (every block), all."""
        self.drop_gradients()
        model = self.model
        if model.recompute == "layer" and model.whole_blocks < len(model.layers):
            policy: RecomputePolicy = "layer"
        elif model.recompute == "all":
            return None
        else:
            order = get_args(RecomputePolicy)
            policy = order[order.index(model.recompute) + 1]
        self.graphs.forget()  # they keep what the old policy kept
        model.set_recompute(policy)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return policy

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yields (parameter name, gradient since the last step or None)."""
        return self._optimiser.named_gradients()

    @torch.no_grad()
    def loss_sum(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Returns sum(cross-entropy) of one micro-batch; without gradients there is no dropout."""
        return self.model.loss_sum(micro_batch.to(self.device))

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """Returns the greedy continuation, the stop token included if met."""
        return self.model.generate(prompt_ids, max_new_tokens, stop_ids)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns masters, moments, step counts, and the count of forward passes that dropout masks follow from."""
        return {**self._optimiser.state(), _CALLS: torch.tensor([self.model.dropout_calls])}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores `state()` exactly. Raises ValueError naming what does not fit."""
        if _CALLS not in state:
            raise ValueError(f"{_CALLS} is missing")
        self._optimiser.load_state(state, others={_CALLS})
        self.model.dropout_calls = self._calls_before = int(state[_CALLS].item())

    def export(self, folder: Path) -> None:
        """Makes `folder` with the adapter in PEFT's format, or the trained tensors, rounded once from the masters.

        Raises:
            SparktuneError: a tensor has another type than when training began, or a folder cannot be written.
        """
        changed = [
            f"{name} is {p.dtype} and was {self._dtypes[name]}" for name, p in self.model.named_parameters()
            if p.dtype != self._dtypes[name]
        ]
        if changed:
            raise SparktuneError(
                f"{len(changed)} tensors changed their type during training, so what was trained is not what was "
                f"planned: {'; '.join(changed[:3])}. This is a bug; the last checkpoint has the masters."
            )
        self._export(folder, self._optimiser.masters())


def kernels_in_words(ops: OpTable) -> str:
    """Returns which kernels a model runs on; each op that a GPU's kernels cannot serve is named with the reason."""
    names, plain = [], []
    for op, reason in ops.reasons.items():
        if not reason.startswith("reference"):
            names.append(reason.split(" ", 1)[0])
        elif "no layer that calls it" not in reason:
            plain.append(f"{op} {reason.removeprefix('reference ')}")
    if not names:
        return "kernels: plain PyTorch (the references)"
    said = "kernels: " + ", ".join(dict.fromkeys(names))
    return said + (f"; plain PyTorch, several times slower, for {'; '.join(plain)}" if plain else "")
