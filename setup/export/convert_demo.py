"""Runs llama.cpp's converter on a model whose tokenizer was trained by the demo.

The converter recognises a pre-tokenizer by the token ids of a fixed text, so a vocabulary made here is unknown to it
although its splitting rule is Qwen3.5's. This wrapper answers for such a model, and for no other: the folder must carry
the demo's marker and its tokenizer.json must split as Qwen3.5 does. It runs as a process of its own, with the pinned
converter on its module path:

    python -m sparktune.setup.export.convert_demo MODEL [the converter's own arguments]
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["MARKER", "demo_objection"]

MARKER = "sparktune-demo.json"
"""The file that setup/demo_model.py puts beside a model it made."""

# What tells Qwen3.5's rule from Qwen2's: combining marks belong to words.
_LETTERS_AND_MARKS = r"[\p{L}\p{M}]+"


def _patterns(pre_tokenizer: Any) -> list[str]:
    """Returns the split patterns of a tokenizer.json's pre_tokenizer, sequences included."""
    if not isinstance(pre_tokenizer, dict):
        return []
    pattern = pre_tokenizer.get("pattern")
    own = [pattern["Regex"]] if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str) else []
    return own + [p for part in pre_tokenizer.get("pretokenizers", []) for p in _patterns(part)]


def demo_objection(folder: Path) -> str:
    """Returns why `folder` is not a model with the demo's tokenizer; empty when it is."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{MARKER} and tokenizer.json are not both there and readable ({error})"
    if not isinstance(marker, dict) or marker.get("made_by") != "sparktune demo":
        return f"{MARKER} does not say that the demo made it"
    patterns = _patterns(tokenizer.get("pre_tokenizer"))
    if not any(_LETTERS_AND_MARKS in pattern for pattern in patterns):
        return f"its pre-tokenizer does not split as Qwen3.5 does (no {_LETTERS_AND_MARKS} in {patterns})"
    return ""


def main(argv: list[str]) -> int:
    """Runs the converter with the demo's tokenizer allowed. Returns the exit code."""
    folder = Path(argv[0])
    objection = demo_objection(folder)
    if objection:
        print(f"{folder} is not a demo model: {objection}.", file=sys.stderr)
        return 1
    base = importlib.import_module("conversion.base")
    recognise = base.TextModel.get_vocab_base_pre

    def recognise_or_demo(model: Any, tokenizer: Any) -> str:
        try:
            return str(recognise(model, tokenizer))
        except NotImplementedError:  # what llama.cpp raises for a pre-tokenizer that it does not know
            return "qwen35"

    base.TextModel.get_vocab_base_pre = recognise_or_demo
    sys.argv = ["convert_hf_to_gguf.py", *argv]
    importlib.import_module("convert_hf_to_gguf").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
