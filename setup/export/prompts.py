"""Which prompts a result is asked: the plan's own, and held-out ones as training would see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.data.read import first_questions
from sparktune.setup.data.render import ChatRenderer
from sparktune.setup.data.tokenizer import ChatTokenizer
from sparktune.setup.plan.schema import Plan

__all__ = ["Prompt", "choose_prompts", "held_out_prompts", "rendered_prompts"]

_LONGEST_PROMPT = 1024
_EXAMPLES_READ = 4096


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt."""

    text: str
    """As shown: the user's message; of a held-out example without one its rendered text without special tokens."""
    ids: tuple[int, ...]
    """As the model gets it, generation prompt included."""
    reference: str | None = None
    """The answer that the data gives; None for a prompt of the plan's."""
    reference_ids: tuple[int, ...] = ()
    """Its tokens, as they were learned or held out."""
    line: int | None = None
    """Line of the data file."""


def held_out_prompts(plan: Plan, dataset: TokenDataset | None, tokenizer: ChatTokenizer, count: int) -> list[Prompt]:
    """Returns the first `count` held-out prompts, each with the answer of the data.

    A prompt is all before the first supervised token, the answer the supervised tokens that follow it without a gap.

    Args:
        plan: data files and the name of their text field.
        dataset: tokenised evaluation examples.
        tokenizer: the model's.
        count: how many.
    """
    found: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
    for index in range(min(len(dataset) if dataset is not None else 0, _EXAMPLES_READ)):
        if len(found) == count:
            break
        assert dataset is not None
        ids, supervised = dataset[index]
        learned = np.flatnonzero(supervised)
        if not len(learned) or not 0 < learned[0] <= _LONGEST_PROMPT:
            continue
        gap = np.flatnonzero(supervised[learned[0]:] == 0)
        end = int(learned[0]) + (int(gap[0]) if len(gap) else len(ids) - int(learned[0]))
        prompt = tuple(int(i) for i in ids[: learned[0]])
        found.setdefault(prompt, (int(dataset.lines[index]), tuple(int(i) for i in ids[learned[0]:end])))
    path = (dataset.file if dataset is not None else None) or plan.eval_data or plan.data
    asked = first_questions(path, {line for line, _ in found.values()}, plan.text_field) if path else {}
    return [
        Prompt(text=asked.get(line) or tokenizer.decode(ids, skip_special_tokens=True).strip(), ids=ids, line=line,
               reference=tokenizer.decode(answer, skip_special_tokens=True).strip(), reference_ids=answer)
        for ids, (line, answer) in found.items()
    ]


def choose_prompts(
    plan: Plan, tokenizer: ChatTokenizer, held_out: TokenDataset | None, count: int = 3
) -> list[Prompt]:
    """Returns the plan's sample prompts and the first few held-out ones, as training would see them.

    Args:
        plan: sample_prompts and thinking count.
        tokenizer: the model's.
        held_out: tokenised evaluation examples.
        count: held-out prompts at most.

    Raises:
        DataError: prompts are given and the tokenizer has no chat template.
    """
    prompts: list[Prompt] = []
    if plan.sample_prompts:
        prompts = rendered_prompts(plan.sample_prompts, tokenizer, plan)
    texts = {p.text for p in prompts}
    return prompts + [p for p in held_out_prompts(plan, held_out, tokenizer, count) if p.text not in texts]


def rendered_prompts(questions: Sequence[str], tokenizer: ChatTokenizer, plan: Plan) -> list[Prompt]:
    """Returns user messages as the model gets them, each once."""
    renderer = ChatRenderer(tokenizer, plan.thinking)
    return [
        Prompt(text=text, ids=tuple(int(i) for i in renderer.prompt_ids([{"role": "user", "content": text}])))
        for text in dict.fromkeys(questions)
    ]
