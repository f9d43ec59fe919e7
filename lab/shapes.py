"""Random models of the five Qwen3.5 sizes and random batches: what every bench of this room measures on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["LORA_TARGETS", "SIZES", "Size", "make_model", "random_documents", "text_config"]

LORA_TARGETS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "in_proj_z", "out_proj",
]


@dataclass(frozen=True, kw_only=True)
class Size:
    """The dimensions in which the five sizes differ."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    value_heads: int
    tied: bool


SIZES = {
    # not a Qwen3.5: the smallest model with all of their head dims, for tests on a GPU
    "tiny": Size(hidden=256, ffn=512, layers=4, heads=2, kv_heads=1, value_heads=32, tied=True),
    "0.8B": Size(hidden=1024, ffn=3584, layers=24, heads=8, kv_heads=2, value_heads=16, tied=True),
    "2B": Size(hidden=2048, ffn=6144, layers=24, heads=8, kv_heads=2, value_heads=16, tied=True),
    "4B": Size(hidden=2560, ffn=9216, layers=32, heads=16, kv_heads=4, value_heads=32, tied=True),
    "9B": Size(hidden=4096, ffn=12288, layers=32, heads=16, kv_heads=4, value_heads=32, tied=False),
    "27B": Size(hidden=5120, ffn=17408, layers=64, heads=24, kv_heads=4, value_heads=48, tied=False),
}


def text_config(name: str) -> dict[str, Any]:
    """Returns the text config of size `name`, in the fields of config.json."""
    s = SIZES[name]
    return {
        "vocab_size": 248320, "hidden_size": s.hidden, "intermediate_size": s.ffn, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": s.value_heads, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "max_position_embeddings": 32768, "tie_word_embeddings": s.tied,
        "eos_token_id": 1, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                            "mrope_section": [11, 11, 10], "mrope_interleaved": True},
    }


def make_model(folder: Path, name: str, seed: int = 0) -> Path:
    """Writes a random bf16 text model of size `name` through transformers, with a byte tokenizer, and returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

    if (folder / "config.json").exists():
        return folder
    config = Qwen3_5TextConfig(**text_config(name))
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3_5ForCausalLM(config)
    torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="2GB")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(["a bench needs no words"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0])
    fast.save_pretrained(folder)
    (folder / "bench.json").write_text(json.dumps({"size": name, "seed": seed}))
    return folder


def random_documents(lengths: list[int], supervised: float, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns (ids [L] int64, labels [L] int64) a document: the last `supervised` share of each is learned."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        ids = torch.randint(3, 240000, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(length * (1 - supervised))] = -100
        documents.append((ids, labels))
    return documents
