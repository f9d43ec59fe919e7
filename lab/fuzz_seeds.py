"""Small valid inputs that fuzzing starts from: one of each shape that a reader knows."""

from __future__ import annotations

import json
import struct
from typing import Any

__all__ = [
    "ADAPTER_WORDS", "CHATS", "CONFIGS", "CONFIG_WORDS", "HEADERS", "LOOP_WORDS", "MANIFESTS", "PLANS", "ROWS",
    "ROW_WORDS",
    "RUNS", "RUN_WORDS", "SAFETENSORS_WORDS", "gguf_seed",
]


def _line(value: Any) -> bytes:
    return json.dumps(value).encode()


_CALL = {"type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}}
CHATS = tuple(map(_line, (
    {"messages": [{"role": "user", "content": "What is 17 + 17?"}, {"role": "assistant", "content": "34."}]},
    {"messages": [
        {"role": "system", "content": "Answer in one short sentence."}, {"role": "user",
        "content": "Hello over there!"},
        {"role": "assistant", "content": "Hi.", "reasoning_content": "They greet."},
        {"role": "user", "content": "And now add one and two."}, {"role": "assistant",
        "content": "<think>\n1+2\n</think>\n\n3"},
    ]},
    {"messages": [
        {"role": "user", "content": "Use the function, please."},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "the result of the call", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "It is 1."},
    ], "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]},
    {"conversations": [{"from": "human", "value": "Good morning to you"}, {"from": "gpt", "value": "Morning."}],
    "system": "s"},
    {"prompt": "What is the weather?", "completion": "Fine."},
    {"instruction": "Translate this sentence", "input": "guten Tag", "output": "good day", "history": [["a", "b"]]},
    {"messages": [
        {"role": "user", "content": "Call it deeply, please."},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a":' * 90 + "1" + "}" * 90}]},
    ]},
)))
ROWS = (
    *CHATS, b'{"text": "plain"}', b" \n" + b'{"body": "x", "text": "y"}\r\n\r\n',
    b"\xef\xbb\xbf" + CHATS[0] + b"\n" + CHATS[4],
    b"\n".join(CHATS),
    _line({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, {"role": "model",
    "content": "c"}]}),
)

PLANS = (
    b"model: Qwen/Qwen3.5-2B\ndata: d.jsonl\nnum_epochs: 2\nlearning_rate: 1e-4\ntarget_modules: [q_proj, k_proj]\n",
    b"--data: x\nepochs: 1.5\nmode: lora\nthinking: on\nvalidator: [python, judge.py]\nsample_prompts: ['a', \"b\"]\n",
    b"model:\n  base_id: a/b\n  quantization: nf4\nadapter:\n  rank: 16\ntraining:\n  epochs: 1\n  scheduler: cosine\n"
    b"dataset:\n  path: d.jsonl\n  packing: true\n",
    b"schema_version: 1\norigins: {mode: flag}\nkernels: {rms_norm: 'triton: fits'}\nname: run-1\nresults: /x/r\n",
    b"# comment\n---\nseed: 1\nlora_r: &r 8\nlora_alpha: *r\n",
)

_LOOP: dict[str, Any] = {
    "step": 2, "position": 4, "tokens": 99, "best_eval_loss": 1.5, "best_step": 2, "evals_without_gain": 0,
    "pending": False,
    "metrics_bytes": 10, "samples_bytes": 0, "maths": {"seed": 1},
}
_TRUE_FILE = {"bytes": 16, "sha256": "76e69ba53d5ed3d0da51b8cb3ae2b2b2bc6d6e0e2ef0b2d10a3a80a7da3c3d3d"}
MANIFESTS = (
    b"M" + json.dumps({"format": 1, "step": 2, "files": {
        "loop.json": {"bytes": len(_line(_LOOP)), "sha256": "HASH"}, "engine.safetensors": _TRUE_FILE,
        "rng.safetensors": _TRUE_FILE,
    }}).encode(),
    _line(_LOOP),
)


def _safetensors(header: dict[str, Any], size: int) -> bytes:
    raw = _line(header)
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


HEADERS = (
    _safetensors({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                  "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}}, 24),
    _safetensors({"__metadata__": {"format": "pt"}, "a": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}, 8),
    _safetensors({}, 0),
)

_TEXT = {
    "model_type": "qwen3_5_text", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
    "full_attention_interval": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "mtp_num_hidden_layers": 1, "max_position_embeddings": 1024,
}
CONFIGS = (
    _line({"model_type": "qwen3_5", "text_config": _TEXT, "tie_word_embeddings": True}),
    _line({"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2,
           "num_attention_heads": 4, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                      "high_freq_factor": 4.0,
                                                      "original_max_position_embeddings": 8192}}),
    _line({"model_type": "qwen2", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
           "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
    _line({"model_type": "mixtral", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
           "num_experts": 4, "moe_intermediate_size": 8}),
    b'A{"base_model_name_or_path": "a/b", "peft_type": "LORA"}',
)

RUNS = (
    b"\x00" + _line({"stages": {"prepare": {"input": "a", "output": "b", "seconds": 1.5}}}),
    b"\x01" + b"\n".join((_line({"step": 1, "loss": 2.5, "lr": 1e-4, "tok_per_s": 9.5, "peak_gib": 0.1, "tokens": 9}),
                          _line({"step": 1, "eval_loss": 2.5}))),
    b"\x02" + b"\n".join((_line({"step": 1, "prompt": "a", "answer": "b"}),
                          _line({"stage": "after", "source": "merged", "prompt": "a", "answer": "c"}))),
    b"\x03" + b"\n".join((_line({"time": 1.0, "stage": "train", "kind": "start"}),
                          _line({"stage": "train", "kind": "choice", "what": "engine", "chosen": "native",
                          "reason": "r"}),
                          _line({"stage": "train", "kind": "end", "ok": True, "seconds": 1.0}))),
    b"\x04" + _line({"sources": {}, "alarms": []}),
    b"\x05" + _line({"path": "d", "sha256": "0", "bytes": 1, "rows": 1}),
    b"\x06" + _line({"base": "nf4", "kl_mean": 0.1, "kl_max": 0.2}),
    b"\x07" + _line({"lines": ["a"]}),
)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_seed() -> bytes:
    """Returns a small GGUF: a text, a number, arrays of texts and numbers, and two tensors."""
    fields = (
        _text(b"general.architecture") + struct.pack("<I", 8) + _text(b"qwen35"),
        _text(b"general.alignment") + struct.pack("<II", 4, 32),
        _text(b"qwen35.block_count") + struct.pack("<II", 4, 4),
        _text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + _text(b"a") + _text(b"b"),
        _text(b"tokenizer.ggml.token_type") + struct.pack("<IIQii", 9, 5, 2, 1, 3),
    )
    tensors = (
        _text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0),
        _text(b"output_norm.weight") + struct.pack("<IQIQ", 1, 32, 0, 96),
    )
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(96 + 128)


# Keys and values that mean something to the readers: what mutations write.
ROW_WORDS = (
    "messages", "conversations", "conversation", "prompt", "completion", "instruction", "input", "output", "history",
    "text", "body", "system", "role", "content", "from", "value", "name", "tools", "tool_calls", "function",
    "arguments",
    "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "type", "image", "user", "assistant",
    "tool", "human", "gpt", "developer", "ipython", "id", "parameters", "images", "tool_call", "input_text",
)
CONFIG_WORDS = (
    "model_type", "text_config", "num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim", "vocab_size",
    "intermediate_size", "num_key_value_heads", "layer_types", "full_attention", "linear_attention", "rope_parameters",
    "sliding_attention", "rope_scaling", "rope_theta", "rope_type", "type", "llama3", "linear", "factor", "mistral",
    "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "partial_rotary_factor", "rms_norm_eps",
    "full_attention_interval", "max_window_layers", "use_sliding_window", "sliding_window", "qwen3_5_text", "qwen2",
    "qwen3", "llama", "num_experts", "moe_intermediate_size", "quantization_config", "mtp_num_hidden_layers",
    "tie_word_embeddings", "base_model_name_or_path", "max_position_embeddings", "linear_num_key_heads", "hidden_act",
)
ADAPTER_WORDS = (
    "peft_type", "LORA", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
    "up_proj",
    "(a+)+$", ".*", "[", "use_dora", "target_modules", "base_model_name_or_path", "layers.0.mlp.up_proj", "(.*.*)*x",
)
SAFETENSORS_WORDS = ("__metadata__", "dtype", "shape", "data_offsets", "F32", "BF16", "F8_E4M3", "F4", "I64", "BOOL",
"a", "b")
LOOP_WORDS = (
    "files", "format", "step", "bytes", "sha256", "engine.safetensors", "rng.safetensors", "loop.json", "position",
    "maths",
    "tokens", "best_eval_loss", "pending", "metrics_bytes", "samples_bytes", "../outside.safetensors", "/etc/hostname",
)
RUN_WORDS = (
    "stages", "input", "output", "seconds", "step", "loss", "eval_loss", "tok_per_s", "peak_gib", "prompt", "answer",
    "stage", "before", "after", "source", "kind", "start", "end", "ok", "message", "level", "error", "text", "choice",
    "what", "chosen", "reason", "lines", "tokens", "lr", "grad_norm", "prepare", "train", "kl_mean", "kl_max", "base",
)
