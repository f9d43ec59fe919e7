"""A plain conversation with a merged model, through transformers: `python -m sparktune.setup.chat --model DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sparktune.setup import strings
from sparktune.setup.plan.untrusted import printable

__all__ = ["main"]

_NEW_TOKENS = 2048


def _load(folder: Path) -> tuple[Any, Any]:
    """Returns (model, tokenizer) from a local folder; nothing is downloaded, no code of the model is run."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """Returns the greedy answer to a conversation; it is written to standard output as it comes."""
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """A model may have learned escape codes; the terminal is not to obey them."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            **inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None,
            top_k=None, streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))


def main(argv: list[str] | None = None) -> int:
    """Reads lines and answers them until an empty line or the end of input. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Talk to a merged model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--max-new-tokens", type=int, default=_NEW_TOKENS, help="longest answer, in tokens")
    asked = parser.parse_args(argv)
    folder: Path = asked.model
    model, tokenizer = _load(folder)
    print(printable(strings.CHAT_HELLO.format(model=folder)), file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        print(strings.CHAT_PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return 0
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, asked.max_new_tokens)})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
