"""One token at a time: what attention and the delta rule keep of the past while text is generated."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["AttentionCache", "DeltaNetCache"]


class AttentionCache:
    """Keys and values of one document, room for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds k and v [T, nKV, D]; returns all keys and values so far, [length, nKV, D]."""
        if self._keys is None or self._values is None:
            self._keys = k.new_empty(self.capacity, *k.shape[1:])
            self._values = v.new_empty(self.capacity, *v.shape[1:])
        end = self.length + k.shape[0]
        self._keys[self.length : end] = k
        self._values[self.length : end] = v
        self.length = end
        return self._keys[:end], self._values[:end]

    @staticmethod
    def attend(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of the newest token: q [1, nH, D], keys and values [L, nKV, D] -> [1, nH, D]."""
        if window is not None:
            keys, values = keys[-window:], values[-window:]
        groups = q.shape[1] // keys.shape[1]
        keys = keys.transpose(0, 1).repeat_interleave(groups, dim=0)
        values = values.transpose(0, 1).repeat_interleave(groups, dim=0)
        return F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, scale=scale).transpose(0, 1)


class DeltaNetCache:
    """The convolution's last W - 1 inputs and the delta rule's state of one document."""

    def __init__(self) -> None:
        self._inputs: torch.Tensor | None = None
        self.state: torch.Tensor | None = None

    @property
    def empty(self) -> bool:
        """Nothing was read yet."""
        return self.state is None

    def remember(self, x: torch.Tensor, taps: int) -> None:
        """Keeps the last taps - 1 rows of x [T, C], zeros where the document is shorter."""
        self._inputs = F.pad(x[-(taps - 1) :], (0, 0, max(0, taps - 1 - x.shape[0]), 0))

    def convolve(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The convolution's next output: x [1, C], weight [C, W] -> silu(...) [1, C]."""
        assert self._inputs is not None, "remember() comes first"
        span = torch.cat((self._inputs, x))
        self._inputs = span[1:]
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.silu((span.to(wide) * weight.to(wide).t()).sum(0, keepdim=True)).to(x.dtype)
