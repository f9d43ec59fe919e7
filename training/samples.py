"""Which prompts are answered during training, and what ends an answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.data.read import first_questions
from sparktune.setup.data.render import ChatRenderer
from sparktune.setup.data.tokenizer import ChatTokenizer
from sparktune.setup.plan.schema import Plan
from sparktune.training.loop import SamplePrompt

__all__ = ["sample_prompts", "stop_ids"]

_HELD_OUT_PROMPTS = 3
# Without a key-value cache an answer costs one pass over its prompt per token: long prompts are left to `evaluate`.
_LONGEST_PROMPT = 512
_EXAMPLES_READ = 64


def sample_prompts(plan: Plan, tokenizer: ChatTokenizer, held_out: TokenDataset | None) -> list[SamplePrompt]:
    """Returns the plan's prompts as the chat template renders them; without any, the first held-out ones.

    A held-out prompt is everything before an example's first supervised token, exactly as training sees it. Rows of
    plain text have no such part and give no prompt.

    Raises:
        DataError: prompts are given and the tokenizer has no chat template.
    """
    if plan.sample_prompts:
        renderer = ChatRenderer(tokenizer, plan.thinking)
        return [
            SamplePrompt(text=text, ids=tuple(renderer.prompt_ids([{"role": "user", "content": text}])))
            for text in plan.sample_prompts
        ]
    prompts: dict[int, tuple[int, ...]] = {}
    for index in range(min(len(held_out), _EXAMPLES_READ) if held_out is not None else 0):
        ids, supervised = held_out[index]
        learned = np.flatnonzero(supervised)
        prompt = tuple(int(i) for i in ids[: learned[0]]) if len(learned) else ()
        if 0 < len(prompt) <= _LONGEST_PROMPT and prompt not in prompts.values():
            prompts[int(held_out.lines[index])] = prompt
        if len(prompts) == _HELD_OUT_PROMPTS:
            break
    path = (held_out.file if held_out is not None else None) or plan.eval_data or plan.data
    asked = first_questions(path, set(prompts), plan.text_field) if path else {}
    return [
        SamplePrompt(text=asked.get(line) or tokenizer.decode(ids, skip_special_tokens=True).strip(), ids=ids)
        for line, ids in prompts.items()
    ]


def stop_ids(tokenizer: ChatTokenizer, train: TokenDataset) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's own, and the special ones that end the data's turns."""
    own = tokenizer.tokenizer.eos_token_id
    special = set(tokenizer.tokenizer.all_special_ids)
    found: set[int] = set() if own is None else {int(own)}
    for index in range(min(len(train), _EXAMPLES_READ)):
        ids, supervised = train[index]
        ends: Sequence[int] = np.flatnonzero(supervised)[-1:].tolist()
        found |= {int(ids[end]) for end in ends} & special
    return sorted(found)
