"""Weights, gradients and optimiser state of full fine-tuning, spread over all ranks by torch's FSDP2 (fully_shard).

Every rank keeps 1/n of each tensor's rows, in full precision, and gathers a block's rows in the compute type when the
block is computed. Checkpoints do not know n: rank 0 writes each tensor whole, in the file that one process would have
written, and whoever resumes takes the rows that are its own. torch.distributed.checkpoint is not used: it keeps its
metadata as a pickle, and it needs a disk that every rank sees, which two boxes on a cable do not have.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sparktune.kernels.modules.rotary import inverse_frequencies
from sparktune.kernels.select import OpTable
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.weights import safetensors_index
from sparktune.training.model import train_everything
from sparktune.training.tower import TextTower
from sparktune.training.weights import check_checkpoint, check_tied_head, checkpoint_names, names_by_file

__all__ = ["build_sharded", "load_sharded"]


def build_sharded(spec: ModelSpec, ops: OpTable, dtype: torch.dtype, device: torch.device, ranks: int) -> TextTower:
    """Allocates this rank's rows of a tower that learns as a whole; no rank ever holds all of it.

    The rows are kept in float32 (float64 under float64): they are the optimiser's masters. Blocks are gathered, and
    compute, in `dtype`; gradients are summed in float32.

    Args:
        spec: from `probe`.
        ops: from `select_ops`.
        dtype: compute type.
        device: of this rank.
        ranks: how many share the tower.
    """
    wide = torch.promote_types(dtype, torch.float32)
    model = TextTower(spec, ops, dtype=wide, device=torch.device("meta"))
    train_everything(model)
    mesh = init_device_mesh(device.type, (ranks,))
    # Inputs stay as they come: a block takes the rotary tables in float32, and hidden states are in `dtype` anyway.
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == wide else dtype, reduce_dtype=wide, cast_forward_inputs=False)
    # Computed with in float32 whatever the compute type, and tiny: every rank has them whole.
    apart = {p for name, p in model.named_parameters() if name.endswith((".A_log", ".dt_bias"))}
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=apart)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=apart)
    assert isinstance(model, FSDPModule), "fully_shard makes it one"
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the supervised tokens of all ranks: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "generate")
    model.to_empty(device=device)
    model.inv_freq = inverse_frequencies(spec.rope_theta, spec.rope_dim, spec.rope_scaling, wide, device)
    model.device, model.dtype = device, dtype
    return model


def _rows_here(parameter: DTensor) -> tuple[int, int]:
    """Returns the first and one past the last of the rows that this rank keeps."""
    size, ranks = parameter.shape[0], parameter.device_mesh.size()
    each = -(-size // ranks)
    first = min(parameter.device_mesh.get_local_rank() * each, size)
    last = min(first + each, size)
    assert parameter.to_local().shape[0] == last - first, "fully_shard splits as torch.chunk does"
    return first, last


@torch.no_grad()
def load_sharded(model: TextTower, model_dir: Path, spec: ModelSpec) -> None:
    """Fills a tower from `build_sharded`: every rank reads its own rows of every tensor and no others.

    Args:
        model: from `build_sharded`.
        model_dir: the checkpoint, on a disk of this rank's machine.
        spec: the model's.

    Raises:
        PreflightError: tensors are missing, unexpected or misshapen (named), or files are missing or damaged.
    """
    index = safetensors_index(model_dir)
    names = checkpoint_names(index, spec)
    check_checkpoint(model_dir, spec, index, names)
    slots, parameters = model.slots(), dict(model.named_parameters())
    for path, held in names_by_file(index, names).items():
        with safe_open(path, framework="pt") as file:
            for name in held:
                slot, there = slots[name], names[name]
                parameter = parameters[slot.parameter]
                if not isinstance(parameter, DTensor):
                    slot.of(parameter).copy_(file.get_tensor(there))
                    continue
                first, last = _rows_here(parameter)
                begin, end = max(first, slot.rows.start), min(last, slot.rows.stop)
                if begin >= end:
                    continue
                rows = file.get_slice(there)[begin - slot.rows.start : end - slot.rows.start]
                # Through the compute type, as one process loads it: a float32 base trained in bfloat16 starts rounded.
                local = parameter.to_local()[begin - first : end - first]
                local.copy_(rows.to(model.dtype).view(local.shape))
    check_tied_head(spec, model_dir, index, names, model.dtype)
