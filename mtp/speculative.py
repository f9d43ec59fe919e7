"""Speculative decoding in plain PyTorch, greedy: what the base would say, in fewer passes of the base.

Every round the head drafts K tokens after the newest one, the base reads the newest token and the drafts in one pass,
and what the base itself would have said at each place decides: drafts are kept up to the first that differs, and the
base's own token takes that one's place. What the pass read beyond is taken back: keys are cut off, and convolution
inputs and delta-rule states return to what they were after the last kept token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparktune.kernels.modules.decoding import AttentionCache
from sparktune.mtp.head import MtpHead
from sparktune.training.tower import TextTower

__all__ = ["Decoded", "Drafter", "HeadDrafter", "speculate"]


@dataclass(kw_only=True)
class Decoded:
    """A greedy continuation and how it came about."""

    tokens: list[int]
    """The continuation, the stop token included if met."""
    rounds: list[int]
    """Accepted drafts of every round."""
    passes: int
    """Passes of the base: the prompt's and one a round."""


Drafter = Callable[[Sequence[int], torch.Tensor], list[int]]
"""(tokens that follow the rows, the base's hidden states of those rows [n, H]) -> drafted tokens."""


class HeadDrafter:
    """Drafts with an MTP head, as serving does: one cache of keys made from the base's hidden states.

    Args:
        tower: the base.
        head: its head.
        drafts: K, at least 1.
        capacity: longest document.
    """

    def __init__(self, tower: TextTower, head: MtpHead, drafts: int, capacity: int) -> None:
        self._tower, self._head, self._drafts = tower, head, drafts
        self._cache = AttentionCache(capacity + drafts)

    @torch.no_grad()
    def __call__(self, tokens: Sequence[int], hidden: torch.Tensor) -> list[int]:
        """Reads the accepted rows, then drafts; the drafts' own keys are forgotten afterwards."""
        tower, head, cache = self._tower, self._head, self._cache
        after = torch.tensor(list(tokens), device=tower.device)
        m = head.step(F.embedding(after, tower.embed_tokens), hidden, cache.length, tower.inv_freq, cache)[-1:]
        drafted: list[int] = []
        for k in range(self._drafts):
            if k:
                embedded = tower.embed_tokens[drafted[-1]][None]
                m = head.step(embedded, m, cache.length, tower.inv_freq, cache)
            drafted.append(int(F.linear(m, tower.head_weight).argmax()))
        cache.rewind(self._drafts - 1)
        return drafted


@torch.no_grad()
def speculate(
    tower: TextTower, draft: Drafter, prompt_ids: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int],
    drafts: int = 2,
) -> Decoded:
    """Returns the greedy continuation, equal to `tower.generate`'s.

    Args:
        tower: the base.
        draft: gives up to `drafts` tokens a round; whatever it gives, the result is the base's.
        prompt_ids: at least one token.
        max_new_tokens: longest continuation.
        stop_ids: tokens that end it.
        drafts: most drafts a round (room in the caches).

    Raises:
        ValueError: no prompt.
    """
    if not prompt_ids:
        raise ValueError("prompt_ids is empty; generation needs at least one token to start from.")
    caches = tower.new_caches(len(prompt_ids) + max_new_tokens + drafts + 1)
    hidden = tower.read_on(prompt_ids, 0, caches)
    answer = [int(F.linear(hidden[-1:], tower.head_weight).argmax())]
    start, passes, rounds = len(prompt_ids), 1, []
    tokens = [*prompt_ids[1:], answer[0]]
    while len(answer) < max_new_tokens and answer[-1] not in stop_ids:
        guesses = draft(tokens, hidden)[: max_new_tokens - len(answer) - 1]
        read = [answer[-1], *guesses]
        hidden = tower.read_on(read, start, caches)
        said = F.linear(hidden, tower.head_weight).argmax(-1).tolist()
        passes += 1
        accepted = 0
        while accepted < len(guesses) and guesses[accepted] == said[accepted] and said[accepted] not in stop_ids:
            accepted += 1
        rounds.append(accepted)
        for cache in caches:
            cache.rewind(len(guesses) - accepted)
        kept = accepted + 1
        start += kept
        hidden, tokens = hidden[:kept], said[:kept]
        answer += tokens
    return Decoded(tokens=answer, rounds=rounds, passes=passes)
