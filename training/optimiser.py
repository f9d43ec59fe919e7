"""AdamW over full-precision masters: low-precision weights never lose a small update or a small gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from sparktune.training.distributed import World
from sparktune.training.moments import make_moments
from sparktune.training.spread import copy_into, split_spread

__all__ = ["MasterAdamW"]


@runtime_checkable
class _Described(Protocol):
    """Tensors that say what they are before they are read."""

    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]: ...


class MasterAdamW:
    """Decoupled AdamW with clipping by global norm.

    A float32 or float64 parameter is its own master. A bfloat16 or float16 one gets a float32 master; its gradient is
    added to the master's in float32 after every backward pass, so accumulation over micro-batches rounds nothing.

    Args:
        named_parameters: (name, parameter) of everything that learns, each once.
        betas: decay rates of the moments.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay, applied to tensors of two and more dimensions only.
        max_grad_norm: largest global norm of the gradients; 0 does not clip.
        world: the ranks over which parameters may be spread (training/sharding.py).
        optimizer: where and how finely the moments are kept (training/moments.py).

    Raises:
        PreflightError: an optimiser of bitsandbytes without a GPU or without the package.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019).
    """

    def __init__(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], *, betas: tuple[float, float], eps: float,
        weight_decay: float, max_grad_norm: float, optimizer: str = "adamw", world: World | None = None,
    ) -> None:
        self.max_grad_norm = max_grad_norm
        self.world = world or World()
        self.keep_gradients = False
        """Zero gradients in place instead of dropping them."""
        self._norm: torch.Tensor | None = None
        self._masters: dict[str, nn.Parameter] = {}
        self._rounded: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._parameters = [parameter for _, parameter in named_parameters]
        for name, parameter in named_parameters:
            self._masters[name] = self._master_of(parameter)
        self._moments = make_moments(optimizer, self._masters, betas=betas, eps=eps, weight_decay=weight_decay)

    def _master_of(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype in (torch.float32, torch.float64):
            return parameter
        master = nn.Parameter(parameter.detach().float())
        parameter.register_post_accumulate_grad_hook(_adds_to(master))
        self._rounded.append((parameter, master))
        return master

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yields (name, full-precision gradient or None)."""
        for name, master in self._masters.items():
            yield name, master.grad

    def gradient_sums(self) -> dict[nn.Parameter, torch.Tensor]:
        """Returns parameter -> the full-precision tensor its gradients are added to, allocated if there is none yet.

        With `keep_gradients` these tensors stay where they are, so CUDA graphs may add to them.
        """
        sums: dict[nn.Parameter, torch.Tensor] = {}
        for parameter, master in zip(self._parameters, self._masters.values(), strict=True):
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            sums[parameter] = master.grad
        return sums

    def _gradients(self) -> list[torch.Tensor]:
        return [m.grad for m in self._masters.values() if m.grad is not None]

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """Returns the global norm of the gradients, a 0-d tensor on the device; nothing here synchronises."""
        rows, gradients = split_spread(self._gradients())
        self._norm = torch.nn.utils.get_total_norm(gradients)
        if rows:
            squares = self.world.sum_on_device(torch.nn.utils.get_total_norm(rows).square())
            self._norm = torch.sqrt(squares + self._norm.square())
        return self._norm

    def gradients(self, learning: Sequence[bool]) -> list[torch.Tensor]:
        """Returns the gradients of those that learn (one entry a tensor, in order), zeros made where there is none."""
        found = []
        for master, learns in zip(self._masters.values(), learning, strict=True):
            if learns and master.grad is None:
                master.grad = torch.zeros_like(master)
            if learns:
                assert master.grad is not None
                found.append(master.grad)
        return found

    @torch.no_grad()
    def step(self, learning_rate: float) -> torch.Tensor:
        """Clips, updates the masters, rounds them into the weights, drops the gradients.

        Returns the global norm before clipping, a 0-d tensor on the device; nothing here synchronises. A norm that was
        asked for just before is not computed again.
        """
        norm = self.norm() if self._norm is None else self._norm
        rows, gradients = split_spread(self._gradients())
        gradients += rows
        if self.max_grad_norm > 0:
            scale = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, scale)
        self._moments.update(learning_rate)
        self.drop_gradients()
        self._round()
        return norm

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Zeroes the gradients, in place or by leaving them out."""
        self._norm = None
        if self.keep_gradients:
            gradients = self._gradients()
            if gradients:
                torch._foreach_zero_(gradients)
        else:
            for master in self._masters.values():
                master.grad = None
        for parameter, master in self._rounded:
            if parameter is not master:
                parameter.grad = None  # of a pass that did not reach its end

    def _round(self) -> None:
        for parameter, master in self._rounded:
            parameter.copy_(master)

    def masters(self) -> dict[str, torch.Tensor]:
        """Returns name -> full-precision weight."""
        return {name: master.detach() for name, master in self._masters.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Returns masters, moments and the step count, by flat names."""
        return {**{f"master.{name}": m.detach() for name, m in self._masters.items()}, **self._moments.state()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], others: Collection[str] = ()) -> None:
        """Restores what `state()` gave.

        Args:
            state: name -> tensor; may read from a file, one tensor at a time.
            others: names in it that belong to somebody else.

        Raises:
            ValueError: entries are missing, unexpected or misshapen; they are named, and nothing was changed.
        """
        mine = self.state()
        wrong = [f"{name} is missing" for name in mine if name not in state]
        wrong += [f"{name} is unexpected" for name in state if name not in mine and name not in others]
        kinds = _kinds_of(state)
        for name, own in mine.items():
            if name in state:
                dtype, shape = kinds[name]
                if shape != tuple(own.shape) or dtype != own.dtype:
                    expected = f"expected {list(own.shape)} {own.dtype}"
                    wrong.append(f"{name} is {list(shape)} {dtype}, {expected}")
        if wrong:
            raise ValueError("; ".join(wrong[:10]) + (f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""))
        for name, own in mine.items():
            copy_into(own, state[name])
        self._round()


def _kinds_of(state: Mapping[str, torch.Tensor]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns name -> (dtype, shape), without reading tensors that are in a file or on another rank."""
    if isinstance(state, _Described):
        return state.kinds()
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def _adds_to(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """Returns a hook that moves a fresh gradient into the master's, in float32."""

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None, "called after a gradient was accumulated"
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
