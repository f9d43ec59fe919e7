"""Greedy answers through transformers: the only way the export stages run a model. Imports torch when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparktune.setup.plan.errors import SparktuneError
from sparktune.setup.plan.untrusted import excerpt

__all__ = ["answer_all", "load", "mean_losses"]


def load(folder: Path, device: str, dtype: Any = None) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of a safetensors model folder, in eval mode.

    Args:
        folder: the model; no code of it is run.
        device: cuda or cpu.
        dtype: torch dtype; bfloat16 on cuda and float32 on cpu when left out.

    Raises:
        SparktuneError: transformers cannot read the folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its advice on faster kernels is for training; in our log it would pose as a cause
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        config = AutoConfig.from_pretrained(folder)
        # A nested text config keeps the dtype of its file and wins over from_pretrained's argument.
        for part in (config, getattr(config, "text_config", None)):
            if part is not None:
                part.dtype = dtype
        model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise SparktuneError(
            f"{folder} should be a model folder that transformers loads, because its answers are to be compared; it "
            f"says: {excerpt(said)}. Weights in several files need their model.safetensors.index.json, which "
            "`save_pretrained` writes."
        ) from error
    return model.to(device=device, dtype=dtype).eval(), tokenizer


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def answer_all(model: Any, tokenizer: Any, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Returns the greedy continuation of each prompt as text, special tokens left out.

    Args:
        model: from `load`.
        tokenizer: from `load`.
        prompt_ids: token ids of each rendered prompt.
        max_new_tokens: longest answer in tokens.
    """
    import torch
    from transformers import GenerationConfig

    stops = _stop_ids(model, tokenizer)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops[0] if stops else None),
    )
    # the folder's own settings (sampling, for most models) must not be merged into these
    model.generation_config = settings
    answers = []
    for ids in prompt_ids:
        prompt = torch.tensor([list(ids)], device=model.device)
        with torch.no_grad():
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        answers.append(tokenizer.decode(out[0, prompt.shape[1]:], skip_special_tokens=True).strip())
    return answers


def mean_losses(model: Any, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """Returns the mean loss in nats of each answer's tokens after its prompt.

    Args:
        model: from `load`.
        examples: token ids of prompt and answer.
    """
    import torch

    found = []
    for prompt, answer in examples:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        with torch.no_grad():
            logits = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt):])))
    return found
