"""The model's own tokenizer and chat template, loaded without torch and without running code of the repository."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sparktune.setup.plan.errors import DataError

__all__ = ["ChatTokenizer", "Tokens", "load_tokenizer"]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One tokenised text."""

    ids: npt.NDArray[np.uint32]
    """[t] token ids."""
    starts: npt.NDArray[np.int64]
    """[t] character of the text at which each token begins."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template."""

    source: str
    """Folder or hub id it came from."""
    tokenizer: Any
    """transformers' tokenizer: template, special tokens, decoding."""
    backend: Any
    """A private tokenizers.Tokenizer without post-processing: ids and exact offsets of the text as it stands."""

    @property
    def template(self) -> str | None:
        """The chat template's text; several named ones as JSON; None if the tokenizer has none."""
        template = self.tokenizer.chat_template
        return template if template is None or isinstance(template, str) else json.dumps(template, sort_keys=True)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of all special tokens, longest first."""
        added = {t.content for t in self.backend.get_added_tokens_decoder().values() if t.special}
        return tuple(sorted(added | set(self.tokenizer.all_special_tokens), key=lambda text: (-len(text), text)))

    @cached_property
    def opening_ids(self) -> list[int]:
        """Ids the tokenizer puts before plain text by itself (a BOS token, or nothing)."""
        ids: list[int] = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        bare: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return ids[: next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)]

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides ids and renders: hashes of the tokenizer and the template, and the special tokens."""
        return {
            "tokenizer": hashlib.sha256(self.backend.to_str().encode()).hexdigest(),
            "template": hashlib.sha256((self.template or "").encode()).hexdigest(),
            "special_tokens": json.dumps(
                {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}, sort_keys=True
            ),
            "opening_ids": json.dumps(self.opening_ids),
        }

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenises texts as they stand: nothing added, nothing cut, special tokens in the text recognised."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            self._by_lengths(text, e.ids) or Tokens(
                ids=np.array(e.ids, dtype=np.uint32),
                starts=np.fromiter((start for start, _ in e.offsets), dtype=np.int64, count=len(e.ids)),
            )
            for text, e in zip(texts, encodings, strict=True)
        ]

    def _by_lengths(self, text: str, ids: list[int]) -> Tokens | None:
        """Returns the tokens with starts added up from the tokens' lengths; None where that is not known to be exact.

        It spares one Python object a token, a third of the whole analysis. A byte-level token stands for the bytes it
        is written with, so the lengths must add up to the text; they do not where a token stands for more or less.
        """
        if self._lengths is None or not text.isascii():
            return None
        tokens = np.array(ids, dtype=np.uint32)
        ends = np.cumsum(self._lengths[tokens])
        if not len(tokens) or ends[-1] != len(text):
            return None
        return Tokens(ids=tokens, starts=np.concatenate([[0], ends[:-1]]))

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64] | None:
        """int64 [vocabulary]: bytes of each token; None for a tokenizer that is not plainly byte-level.

        Only steps are accepted that keep every byte of an ASCII text in its place (NFC changes none of them).
        """
        parts = json.loads(self.backend.to_str())
        if (
            any(step["type"] != "NFC" for step in _steps(parts.get("normalizer"), "normalizers"))
            or any(step["type"] not in ("Split", "ByteLevel", "Digits") or step.get("add_prefix_space")
                   or step.get("behavior", "Isolated") != "Isolated"
                   for step in _steps(parts.get("pre_tokenizer"), "pretokenizers"))
            or "ByteLevel" not in {step["type"] for step in _steps(parts.get("pre_tokenizer"), "pretokenizers")}
            or parts["model"].get("type") != "BPE" or parts["model"].get("unk_token")
            or any(token["lstrip"] or token["rstrip"] for token in parts["added_tokens"])
        ):
            return None
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        added = {token["id"]: len(token["content"].encode()) for token in parts["added_tokens"]}
        lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for text, number in vocabulary.items():
            lengths[number] = added.get(number, len(text))  # of the rest, each character is written for one byte
        return lengths

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of `ids`."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens,
                                         clean_up_tokenization_spaces=False))


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """Returns the steps of a normaliser or pre-tokeniser, as tokenizer.json describes it."""
    if part is None:
        return []
    return [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]


def load_tokenizer(source: str) -> ChatTokenizer:
    """Loads the tokenizer and chat template of a model.

    Args:
        source: a local folder or a hub id.

    Raises:
        DataError: it cannot be loaded, or is of a kind without a tokenizer.json (no exact offsets).
    """
    if importlib.util.find_spec("torch") is None:
        # Only the advice to install PyTorch is muted; a tokenizer needs none.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, use_fast=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, Rust's among them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"The tokenizer of {source} should load from tokenizer.json and tokenizer_config.json, but: {reason} "
            "Check that the folder is complete, or name the model by its hub id."
        ) from error
    if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
        raise DataError(
            f"The tokenizer of {source} should have a tokenizer.json (which gives exact offsets); it is a "
            f"{type(tokenizer).__name__} without one. Convert it with AutoTokenizer(...).save_pretrained."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    if backend.get_vocab(with_added_tokens=False).keys() <= special:
        # without tokenizer.json transformers builds an empty one from the config: every text would become nothing
        raise DataError(
            f"The tokenizer of {source} should have a vocabulary; it has special tokens only: tokenizer.json is "
            "missing or empty. Copy tokenizer.json there from the model it belongs to."
        )
    backend.no_truncation()
    backend.no_padding()
    # A ByteLevel post-processor may trim the offsets of leading spaces; a bare template leaves them exact.
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return ChatTokenizer(source=source, tokenizer=tokenizer, backend=backend)
