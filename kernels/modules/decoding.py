"""A few tokens at a time: what attention and the delta rule keep of the past while text is generated."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparktune.kernels.gated_delta_rule.reference import gated_delta_rule_step

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

    def rewind(self, tokens: int) -> None:
        """Forgets the newest `tokens` tokens: a draft that was not accepted."""
        self.length -= tokens

    @staticmethod
    def attend(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of the newest n tokens: q [n, nH, D], keys and values [L, nKV, D] -> [n, nH, D]."""
        count, length = q.shape[0], keys.shape[0]
        if count == 1 and window is not None:
            keys, values = keys[-window:], values[-window:]
        groups = q.shape[1] // keys.shape[1]
        keys = keys.transpose(0, 1).repeat_interleave(groups, dim=0)
        values = values.transpose(0, 1).repeat_interleave(groups, dim=0)
        mask = None
        if count > 1:
            key = torch.arange(length, device=q.device)
            ahead = key - key[-count:, None]
            mask = ahead <= 0
            if window is not None:
                mask &= ahead > -window
        return F.scaled_dot_product_attention(
            q.transpose(0, 1), keys, values, attn_mask=mask, scale=scale
        ).transpose(0, 1)


class DeltaNetCache:
    """The convolution's last W - 1 inputs and the delta rule's state of one document.

    A state cannot be shortened like keys can, so the states after each token of the last pass are kept until the next.
    """

    def __init__(self) -> None:
        self._inputs: torch.Tensor | None = None
        self._span: torch.Tensor | None = None
        self._states: list[torch.Tensor] = []
        self.state: torch.Tensor | None = None

    @property
    def empty(self) -> bool:
        """Nothing was read yet."""
        return self.state is None

    def remember(self, x: torch.Tensor, taps: int) -> None:
        """Keeps the last taps - 1 rows of x [T, C], zeros where the document is shorter."""
        self._inputs = F.pad(x[-(taps - 1) :], (0, 0, max(0, taps - 1 - x.shape[0]), 0))

    def convolve(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The convolution's next n outputs: x [n, C], weight [C, W] -> silu(...) [n, C]."""
        assert self._inputs is not None, "remember() comes first"
        self._span = torch.cat((self._inputs, x))
        self._inputs = self._span[x.shape[0] :]
        wide = torch.promote_types(x.dtype, torch.float32)
        windows = self._span.to(wide).unfold(0, weight.shape[1], 1)
        return F.silu((windows * weight.to(wide)).sum(-1)).to(x.dtype)

    def advance(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:
        """The delta rule's output [n, HV, V] for n more tokens (arguments as `gated_delta_rule`, without documents)."""
        outputs, self._states = [], []
        for token in range(q.shape[0]):
            assert self.state is not None, "the first pass fills the cache"
            one = slice(token, token + 1)
            out, self.state = gated_delta_rule_step(q[one], k[one], v[one], g[one], beta[one], self.state)
            outputs.append(out)
            self._states.append(self.state)
        return torch.cat(outputs)

    def rewind(self, tokens: int) -> None:
        """Forgets the newest `tokens` tokens of the last pass, which must not have been the first one."""
        if tokens == 0:
            return
        kept = len(self._states) - tokens
        assert kept >= 1, "only a pass's own tokens are undone, never all of them"
        assert self._span is not None
        assert self._inputs is not None
        self.state = self._states[kept - 1]
        self._inputs = self._span[kept : kept + self._inputs.shape[0]]
