"""AdamW's moments and update: torch's in float32, or bitsandbytes' in eight bits, or paged.

bitsandbytes gives the kernels and the managed memory; the bookkeeping is ours, for its own optimiser classes wait for
the device after every tensor and keep state that safetensors cannot hold.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization; 2023, QLoRA (paging).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from sparktune.setup.plan.errors import PreflightError
from sparktune.training.quantised import import_bitsandbytes
from sparktune.training.spread import is_spread

__all__ = ["BnbMoments", "Moments", "TorchMoments", "make_moments"]

_BLOCK = 256
_LEAST_QUANTISED = 4096
"""Elements below which a tensor's moments stay in float32, as bitsandbytes has it: norms and biases."""
_LEAST_PAGED = 100_000


class Moments(Protocol):
    """The moments of all masters, and the update."""

    def update(self, learning_rate: float) -> None:
        """One step of AdamW for every master with a gradient."""

    def state(self) -> dict[str, torch.Tensor]:
        """Returns everything by flat names; loading copies into these tensors."""


class TorchMoments:
    """torch.optim.AdamW, fused on a GPU.

    Args:
        masters: name -> master.
        betas: decay rates.
        eps: AdamW's epsilon.
        weight_decay: of tensors of two and more dimensions.
    """

    def __init__(
        self, masters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self._masters = masters
        groups = [  # the fused update takes tensors that are spread over ranks, or others, but not both in one list
            {"params": [m for m in masters.values() if (m.ndim >= 2) == decays and is_spread(m) == spread],
             "weight_decay": weight_decay if decays else 0.0}
            for decays in (True, False) for spread in (True, False)
        ]
        on_gpu = any(m.is_cuda for m in masters.values())
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True if on_gpu else None,
        )
        for master in masters.values():
            # Made here rather than at the first step, so that state() is complete from the start.
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device if on_gpu else "cpu"),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def update(self, learning_rate: float) -> None:
        """One step."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns moments and step counts."""
        state: dict[str, torch.Tensor] = {}
        for name, master in self._masters.items():
            own = self._adamw.state[master]
            state[f"exp_avg.{name}"] = own["exp_avg"]
            state[f"exp_avg_sq.{name}"] = own["exp_avg_sq"]
            state[f"adam_step.{name}"] = own["step"]
        return state


class _Pair:
    """One master's two moments: float32, or bytes with a float32 scale for every 256 of them."""

    def __init__(self, master: nn.Parameter, *, eight_bit: bool, paged: bool, library: Any) -> None:
        self.eight_bit = eight_bit and master.numel() >= _LEAST_QUANTISED
        self.paged = paged and master.numel() >= _LEAST_PAGED
        dtype = torch.uint8 if self.eight_bit else torch.float32
        self.first, self.second = (self._allocate(master, dtype, library) for _ in range(2))
        blocks = -(-master.numel() // _BLOCK) if self.eight_bit else 0
        self.first_scale, self.second_scale = (
            torch.zeros(blocks, dtype=torch.float32, device=master.device) for _ in range(2)
        )

    def _allocate(self, master: nn.Parameter, dtype: torch.dtype, library: Any) -> torch.Tensor:
        if not self.paged:
            return torch.zeros_like(master, dtype=dtype)
        tensor: torch.Tensor = library.get_paged(*master.shape, dtype=dtype, device=master.device)
        library.fill(tensor, 0)
        return tensor

    def state(self, name: str) -> dict[str, torch.Tensor]:
        kept = {f"exp_avg.{name}": self.first, f"exp_avg_sq.{name}": self.second}
        if self.eight_bit:
            kept |= {f"exp_avg_scale.{name}": self.first_scale, f"exp_avg_sq_scale.{name}": self.second_scale}
        return kept


class BnbMoments:
    """bitsandbytes' AdamW kernels over our float32 masters.

    Args:
        masters: name -> float32 master on a CUDA device.
        betas: decay rates.
        eps: AdamW's epsilon.
        weight_decay: of tensors of two and more dimensions.
        eight_bit: moments of tensors of 4096 and more elements in eight bits, block by block.
        paged: moments of tensors of 100,000 and more elements in managed memory, which moves to the host when the
            device is full.
        library: bitsandbytes.functional.
    """

    def __init__(
        self, masters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, weight_decay: float,
        eight_bit: bool, paged: bool, library: Any,
    ) -> None:
        assert all(m.is_contiguous() for m in masters.values()), "the kernels read values in order through pointers"
        self._masters, self._betas, self._eps, self._decay = masters, betas, eps, weight_decay
        self._library = library
        self._step = torch.zeros((), dtype=torch.int64)
        device = next(iter(masters.values())).device
        self._signed, self._unsigned = (
            library.create_dynamic_map(signed=signed).to(device) for signed in (True, False)
        )
        self._pairs = {
            name: _Pair(m, eight_bit=eight_bit, paged=paged, library=library) for name, m in masters.items()
        }

    def update(self, learning_rate: float) -> None:
        """One step; only launches, nothing waits."""
        self._step += 1
        step = int(self._step)
        for name, master in self._masters.items():
            if master.grad is None:
                continue
            pair, decay = self._pairs[name], self._decay if master.ndim >= 2 else 0.0
            gradient = master.grad.contiguous()  # read through a bare pointer
            if pair.paged:
                self._library.prefetch_tensor(pair.first)
                self._library.prefetch_tensor(pair.second)
            if pair.eight_bit:
                self._library.optimizer_update_8bit_blockwise(
                    "adam", gradient, master, pair.first, pair.second, *self._betas, 0.0, 0.0, self._eps, step,
                    learning_rate, self._signed, self._unsigned, pair.first_scale, pair.second_scale,
                    weight_decay=decay,
                )
            else:
                self._library.optimizer_update_32bit(
                    "adam", gradient, master, pair.first, self._betas[0], self._eps, step, learning_rate,
                    pair.second, self._betas[1], weight_decay=decay,
                )

    def state(self) -> dict[str, torch.Tensor]:
        """Returns moments, their scales and the step count, when the device has written them."""
        if any(pair.paged for pair in self._pairs.values()):
            torch.cuda.synchronize()  # managed memory is read by the host as it stands
        state = {"adam_step": self._step}
        for name, pair in self._pairs.items():
            state |= pair.state(name)
        return state


def make_moments(
    optimizer: str, masters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> Moments:
    """Returns the moments of a plan's optimiser.

    Args:
        optimizer: adamw, adamw_torch, adamw_8bit, paged_adamw_32bit or paged_adamw_8bit.
        masters: name -> master.
        betas: decay rates.
        eps: AdamW's epsilon.
        weight_decay: of tensors of two and more dimensions.

    Raises:
        PreflightError: bitsandbytes' optimisers without a GPU, without the package, or over float64 masters.
    """
    if optimizer in ("adamw", "adamw_torch"):
        return TorchMoments(masters, betas=betas, eps=eps, weight_decay=weight_decay)
    if not all(m.is_cuda and m.dtype == torch.float32 for m in masters.values()):
        raise PreflightError(
            f"--optimizer {optimizer} runs on bitsandbytes' kernels, which need a CUDA GPU and float32 masters. Use "
            "--optimizer adamw."
        )
    return BnbMoments(
        masters, betas=betas, eps=eps, weight_decay=weight_decay, eight_bit=optimizer.endswith("8bit"),
        paged=optimizer.startswith("paged"),
        library=import_bitsandbytes(f"--optimizer {optimizer}", "--optimizer adamw"),
    )
