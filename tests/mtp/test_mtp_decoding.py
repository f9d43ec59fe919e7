"""Speculative decoding says token for token what plain greedy decoding says, whatever is drafted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from sparktune.kernels.modules.decoding import DeltaNetCache
from sparktune.mtp.head import MtpHead
from sparktune.mtp.speculative import Decoded, Drafter, HeadDrafter, speculate
from sparktune.training.tower import TextTower

Load = Callable[[torch.dtype], tuple[TextTower, MtpHead]]
NEW = 5


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    # from one token, shorter than the convolution, to some dozens
    return [[chance.randrange(97) for _ in range(chance.choice((1, 2, 3, 5, 11, 24)))] for _ in range(count)]


def half_right(answer: Sequence[int], seed: int) -> Drafter:
    """Drafts the true continuation with wrong tokens strewn in, so that rounds keep 0, 1 and 2 drafts."""
    chance, said = random.Random(seed), [0]

    def draft(tokens: Sequence[int], hidden: torch.Tensor) -> list[int]:
        said[0] += len(tokens) if said[0] else 1
        true = list(answer[said[0] : said[0] + 2])
        return [t if chance.random() < 0.6 else (t + 1) % 97 for t in true]

    return draft


def disagreements(tower: TextTower, head: MtpHead, count: int, stops: Sequence[int] = ()) -> tuple[int, list[Decoded]]:
    """Returns how many texts differ from plain decoding, and everything decoded."""
    wrong, done = 0, []
    for number, prompt in enumerate(make_prompts(count)):
        plain = tower.generate(prompt, NEW, stops)
        own = HeadDrafter(tower, head, 2, len(prompt) + NEW)
        for drafter in (own, half_right(plain, number)):
            found = speculate(tower, drafter, prompt, NEW, stops)
            wrong += found.tokens != plain
            done.append(found)
    return wrong, done


def test_equal_over_200_prompts_with_all_kinds_of_rounds(loaded: Load) -> None:
    tower, head = loaded(torch.float32)
    wrong, done = disagreements(tower, head, 200)
    assert wrong == 0
    assert {a for d in done for a in d.rounds} == {0, 1, 2}
    assert all(len(d.tokens) == NEW for d in done)
    # a round's pass gives its accepted drafts and one token of the base's own; the prompt's pass gives one
    assert all(len(d.tokens) == 1 + sum(d.rounds) + len(d.rounds) for d in done)
    assert all(d.passes == 1 + len(d.rounds) for d in done)


@pytest.mark.parametrize("broken", ["nothing", "convolution", "state", "keys"])
def test_what_is_taken_back_leaves_no_trace(loaded: Load, broken: str) -> None:
    tower, _ = loaded(torch.float64)
    text = [5, 17, 40, 41, 42, 43, 44]
    caches = tower.new_caches(16)
    tower.read_on(text, 0, caches)
    tower.read_on([7, 8, 9], len(text), caches)  # 7 is kept, 8 and 9 were wrong drafts
    for cache in caches:
        kept = (cache._inputs, cache.state) if isinstance(cache, DeltaNetCache) else None
        if kept is None and broken == "keys":
            continue
        cache.rewind(2)
        if kept is not None and broken == "convolution":
            cache._inputs = kept[0]
        if kept is not None and broken == "state":
            cache.state = kept[1]
    found = tower.read_on([11], len(text) + 1, caches)[-1]
    fresh = tower.read_on([*text, 7, 11], 0, tower.new_caches(16))[-1]
    difference = float((found - fresh).abs().max())
    assert difference < 1e-12 if broken == "nothing" else difference > 1e-6


def test_a_stop_token_ends_the_text_even_where_a_draft_guessed_it(loaded: Load) -> None:
    tower, head = loaded(torch.float32)
    for prompt in make_prompts(6, seed=5):
        plain = tower.generate(prompt, NEW, ())
        for stop in {plain[0], plain[2], plain[-1]}:
            want = tower.generate(prompt, NEW, (stop,))
            assert want[-1] == stop
            for drafter in (HeadDrafter(tower, head, 2, len(prompt) + NEW), half_right(want, 1)):
                assert speculate(tower, drafter, prompt, NEW, (stop,)).tokens == want


def test_no_prompt_is_refused(loaded: Load) -> None:
    tower, _ = loaded(torch.float32)
    with pytest.raises(ValueError, match="at least one token"):
        speculate(tower, lambda tokens, hidden: [], [], 4, ())
