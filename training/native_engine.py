"""The native engine: our own text tower, LoRA or full fine-tuning, AdamW over full-precision masters."""

from __future__ import annotations

import gc
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
from sparktune.training.distributed import World
from sparktune.training.graphs import TowerGraphs
from sparktune.training.model import TextTower, build_model, export_weights, load_weights, train_everything
from sparktune.training.optimiser import MasterAdamW
from sparktune.training.quantised import build_hollow, frozen_parameters, stored_bytes, storing
from sparktune.training.spread import WholeTensors, local_rows, split_spread, whole
from sparktune.training.tower import RecomputePolicy

__all__ = ["NativeEngine", "kernels_in_words"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
_CALLS = "dropout.calls"
"""In checkpoints of earlier versions: a count of forward passes that dropout masks followed from."""


class NativeEngine:
    """A text tower that learns (training/engine.py says what the methods mean).

    Args:
        model: filled, with whatever learns set to require gradients.
        plan: the optimiser's settings.
        export: writes the result into a folder it makes, given the masters by parameter name; without a folder it
            only asks for what rank 0 asks for.
        what: what learns, in words.
        world: the ranks that learn together.
        sharded: the model is spread over them (training/sharding.py); otherwise every rank has it whole.
    """

    def __init__(
        self, model: TextTower, plan: Plan, export: Callable[[Path | None, Mapping[str, torch.Tensor]], None],
        what: str, world: World | None = None, sharded: bool = False,
    ) -> None:
        self.model = model
        self.device = model.device
        self._export = export
        self._what = what
        self._world = world or World()
        self._sharded = sharded
        self._learning: list[bool] | None = None
        """Which tensors got a gradient on some rank; found out at the first step."""
        learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._optimiser = MasterAdamW(
            learning, betas=(plan.adam_beta1, plan.adam_beta2), eps=plan.adam_eps, weight_decay=plan.weight_decay,
            max_grad_norm=plan.max_grad_norm, optimizer=plan.optimizer, world=self._world,
        )
        self.graphs = TowerGraphs(
            model, None if sharded else self._optimiser.gradient_sums,
            0.0 if plan.mode == "full" else plan.lora_dropout,
        )
        # A graph adds to gradients at fixed addresses.
        self._optimiser.keep_gradients = not self.graphs.objection
        self._calls_before = model.dropout_calls
        self._dtypes = {name: p.dtype for name, p in model.named_parameters()}
        model.train()

    @classmethod
    def build(
        cls, plan: Plan, spec: ModelSpec, model_dir: Path, device: torch.device, ops: OpTable | None = None,
        world: World | None = None,
    ) -> NativeEngine:
        """Builds, fills and prepares the model that a plan describes.

        Args:
            plan: complete; `model` may be a PEFT adapter folder, which then goes on learning.
            spec: the base model's.
            model_dir: the base model's folder.
            device: where it trains.
            ops: the implementations to use; selected for device and type when left out.
            world: the ranks that learn together; this one alone when left out. Adapters, which are small, every rank
                has whole; full fine-tuning spreads weights, gradients and moments over the ranks.

        Raises:
            PreflightError: the checkpoint is incomplete or of an unknown architecture, or the GPU cannot run the plan.
            UsageError: a target that the model does not have, or an adapter that does not fit.
        """
        dtype = _DTYPES[plan.dtype]
        check_card(device, dtype)
        ops, storage, world = ops or select_ops(device, dtype, spec), base_storage(plan), world or World()
        assert plan.recompute != "auto", "resolved before the model is built"
        if plan.mode == "full" and not world.alone:
            return cls._sharded_engine(plan, spec, model_dir, device, ops, world)
        if storage == "none":
            model = build_model(spec, ops, dtype, device)
            load_weights(model, model_dir, spec)
        else:
            model = build_hollow(spec, ops, dtype, device)
            load_weights(model, model_dir, spec, storing(storage, plan.double_quantise))
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
        def export(out: Path | None, masters: Mapping[str, torch.Tensor]) -> None:
            if out is not None:
                save_adapter(model, out, config, base, plan.layout, masters)

        return cls(model, plan, export, what, world)

    @classmethod
    def _sharded_engine(
        cls, plan: Plan, spec: ModelSpec, model_dir: Path, device: torch.device, ops: OpTable, world: World
    ) -> NativeEngine:
        from sparktune.training.sharding import build_sharded, load_sharded  # a second of imports that others save

        model = build_sharded(spec, ops, _DTYPES[plan.dtype], device, world.size)
        load_sharded(model, model_dir, spec)
        model.set_recompute(plan.recompute, plan.recompute_layers)
        return cls(
            model, plan, lambda folder, masters: export_weights(model, model_dir, folder, masters),
            f"full fine-tuning of {sum(1 for _ in model.parameters())} tensors, spread over {world.size} ranks", world,
            sharded=True,
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
        """Adds the gradients of sum(cross-entropy) / n_supervised; alone, nothing here waits for the device.

        With other ranks the gradients are those of all ranks together afterwards, summed once, at the end; the loss is
        this rank's share.
        """
        wide = torch.promote_types(self.model.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=self.device)
        for batch, last in _with_last(micro_batches):
            if self._sharded:
                self.model.set_requires_gradient_sync(last)
            # A spread block is gathered by all ranks or by none, so nobody leaves a pass out.
            if batch.supervised_tokens or self._sharded:
                total += self._pass(batch.to(self.device), n_supervised)
        self._add_up()
        return total

    def _add_up(self) -> None:
        """Sums the gradients that every rank has whole over the ranks.

        torch's DDP is not used: it sums what autograd hands to a parameter, in that parameter's type, while gradients
        here are float32 sums beside bfloat16 parameters, to which recorded passes add without autograd's hooks.
        """
        if self._world.alone:
            return
        if self._learning is None:
            has = torch.tensor([gradient is not None for _, gradient in self.named_gradients()], dtype=torch.uint8)
            self._learning = self._world.largest(has).bool().tolist()
        _, own = split_spread(self._optimiser.gradients(self._learning))
        self._world.add_up(own)

    def _pass(self, batch: MicroBatch, n_supervised: int) -> torch.Tensor:
        """One micro-batch: adds its gradients, returns its share of the loss."""
        if batch.place is not None:
            self.model.dropout_calls = batch.place
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
        gc.collect()  # frames of the exception may lie in reference cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return policy

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yields (parameter name, gradient since the last step or None); of a spread one, the rows that are here."""
        for name, gradient in self._optimiser.named_gradients():
            yield name, None if gradient is None else local_rows(gradient)

    @torch.no_grad()
    def loss_sum(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Returns sum(cross-entropy) of one micro-batch; without gradients there is no dropout."""
        loss = self.model.loss_sum(micro_batch.to(self.device))
        self._put_back()
        return loss

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """Returns the greedy continuation, the stop token included if met."""
        agree = None if not self._sharded else lambda token: int(self._world.sums([token * self._world.leads])[0])
        answer = self.model.generate(prompt_ids, max_new_tokens, stop_ids, agree)
        self._put_back()
        return answer

    def _put_back(self) -> None:
        """After a pass without a backward: FSDP2 leaves embedding, last norm and head gathered, in the compute type."""
        if self._sharded:
            self.model.reshard()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns masters, moments and step counts. Dropout masks follow from the place in the data."""
        return self._optimiser.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores `state()` exactly. Raises ValueError naming what does not fit."""
        self._optimiser.load_state(state, others={_CALLS})

    def lend(self) -> None:
        """Asks for every tensor of `state()` that is spread, as rank 0 does while it writes them."""
        for tensor in self.state().values():
            whole(tensor)

    def export(self, folder: Path | None) -> None:
        """Makes `folder` with the adapter in PEFT's format, or the trained tensors, rounded once from the masters.

        Without a folder this rank writes nothing and lends its rows to rank 0, which does.

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
        masters = self._optimiser.masters()
        self._export(folder, WholeTensors(masters) if self._sharded else masters)


def _with_last(micro_batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
    """Yields each micro-batch and whether it is the last; one ahead, so that it is built while the device works."""
    held: MicroBatch | None = None
    for batch in micro_batches:
        if held is not None:
            yield held, False
        held = batch
    if held is not None:
        yield held, True


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
