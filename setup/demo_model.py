"""A tiny Qwen3.5, made here: every structural feature of the real ones at a few million parameters."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparktune.setup.demo_corpus import smoke_rows, stdlib_rows
from sparktune.setup.demo_drafts import learn_drafts
from sparktune.setup.demo_pretrain import learn_pairs
from sparktune.setup.demo_tokenizer import train_tokenizer, write_tokenizer
from sparktune.setup.plan.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["MARKER_FILE", "is_made_as", "make_model", "mtp_shapes"]

MARKER_FILE = "sparktune-demo.json"
_RECIPE_VERSION = 5
_SHARD_BYTES = 4 * 2**20


def make_model(
    folder: Path,
    *,
    hidden: int = 256,
    layers: int = 4,
    seed: int = 3407,
    sharded: bool = True,
    tied: bool = True,
    vocab_size: int = 4096,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    pretrained: bool = False,
) -> Path:
    """Writes a tiny random Qwen3.5 in the multimodal layout, complete with tokenizer, and returns its folder.

    Text tower (`model.language_model.*`): full attention in every fourth layer, GatedDeltaNet in the others with two
    value heads for each key head, partial rotary embedding. Vision tower (`model.visual.*`) of one block. MTP head
    (`mtp.*`, 15 tensors). All input widths are multiples of 256, as K-quants want. The folder appears by rename; one
    that this function made with the same arguments is kept as it is.

    Args:
        folder: where the model goes.
        hidden: hidden size, a multiple of 256.
        layers: text layers, at least 1.
        seed: seed of the weights.
        sharded: several safetensors shards with an index, instead of one file.
        tied: output head tied to the embeddings; otherwise `lm_head.weight` is stored too.
        vocab_size: tokens of the tokenizer, at least 384; the model's is padded to a multiple of 128.
        dtype: type of the stored weights.
        pretrained: spend some seconds on teaching it which token follows which (setup/demo_pretrain.py), and its MTP
            head to draft that (setup/demo_drafts.py); wants tied embeddings and two layers.

    Raises:
        ValueError: a size is out of its domain.
        UsageError: `folder` exists and holds something else.
    """
    if hidden < 256 or hidden % 256:
        raise ValueError(f"hidden must be a multiple of 256; got {hidden}.")
    if layers < 1:
        raise ValueError(f"layers must be at least 1; got {layers}.")
    if pretrained and (layers < 2 or not tied):
        raise ValueError(f"pretrained wants tied embeddings and at least 2 layers; got tied={tied}, layers={layers}.")
    recipe = {
        "version": _RECIPE_VERSION, "hidden": hidden, "layers": layers, "seed": seed, "sharded": sharded,
        "tied": tied, "vocab_size": vocab_size, "dtype": dtype, "pretrained": pretrained,
        "python": platform.python_version(),
    }
    folder = Path(folder)
    if folder.exists():
        found = _recipe_of(folder)
        if found == recipe:
            return folder
        what = "a demo model made with other settings" if found else "something that is not a demo model"
        raise UsageError(f"{folder} should be new for the demo model, but it holds {what}. Remove it or name another.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        ids = write_tokenizer(partial, _demo_tokenizer(vocab_size))
        config = _config(hidden, layers, vocab_size, ids, tied, dtype)
        _write_json(partial / "config.json", config)
        _write_side_files(partial, ids)
        tensors = _tensors(config, seed)
        if pretrained:
            answers = [m["content"] for row in stdlib_rows() for m in row["messages"] if m["role"] == "assistant"]
            eps = config["text_config"]["rms_norm_eps"]
            learn_pairs(tensors, _demo_tokenizer(vocab_size), answers, eps)
            learn_drafts(tensors, _demo_tokenizer(vocab_size), answers, eps)
        _write_weights(partial, {name: t.to(_dtype(dtype)) for name, t in tensors.items()}, sharded)
        marker = {"made_by": "sparktune demo", "note": "Weights and tokenizer were made on this machine.",
                  "recipe": recipe}
        _write_json(partial / MARKER_FILE, marker)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def mtp_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the 15 MTP tensors for a text config (facts: vLLM's and llama.cpp's loaders)."""
    h, i, d = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    layer = "mtp.layers.0."
    return {
        "mtp.fc.weight": (h, 2 * h),
        "mtp.pre_fc_norm_embedding.weight": (h,),
        "mtp.pre_fc_norm_hidden.weight": (h,),
        "mtp.norm.weight": (h,),
        layer + "input_layernorm.weight": (h,),
        layer + "post_attention_layernorm.weight": (h,),
        layer + "self_attn.q_proj.weight": (2 * heads * d, h),
        layer + "self_attn.k_proj.weight": (kv * d, h),
        layer + "self_attn.v_proj.weight": (kv * d, h),
        layer + "self_attn.o_proj.weight": (h, heads * d),
        layer + "self_attn.q_norm.weight": (d,),
        layer + "self_attn.k_norm.weight": (d,),
        layer + "mlp.gate_proj.weight": (i, h),
        layer + "mlp.up_proj.weight": (i, h),
        layer + "mlp.down_proj.weight": (h, i),
    }


def is_made_as(folder: Path, *, any_python: bool = False, **arguments: Any) -> bool:
    """Returns whether `make_model` made `folder` with these arguments, others at their defaults.

    Under this Python, or under whichever with `any_python`.
    """
    found = _recipe_of(folder)
    python = found.get("python") if found and any_python else platform.python_version()
    made = {**(make_model.__kwdefaults__ or {}), **arguments}
    return found == {"version": _RECIPE_VERSION, "python": python, **made}


def _recipe_of(folder: Path) -> dict[str, Any] | None:
    """Returns what a demo model's marker says of its making, None for any other folder."""
    try:
        recipe = json.loads((folder / MARKER_FILE).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return recipe if isinstance(recipe, dict) else None


@lru_cache(maxsize=4)
def _demo_tokenizer(vocab_size: int) -> str:
    rows = [*smoke_rows(), *stdlib_rows()]
    return train_tokenizer((m["content"] for row in rows for m in row["messages"]), vocab_size)


def _config(hidden: int, layers: int, vocab_size: int, ids: dict[str, int], tied: bool, dtype: str) -> dict[str, Any]:
    text = {
        "model_type": "qwen3_5_text",
        "vocab_size": -(-vocab_size // 128) * 128,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "head_dim": 64,
        "hidden_act": "silu",
        "layer_types": ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)],
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": hidden // 128,
        "linear_num_value_heads": hidden // 64,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 262144,
        # A quarter of head_dim, as in the real sizes: 16 rotary dims, hence sections that sum to 8.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                            "mrope_interleaved": True, "mrope_section": [3, 3, 2]},
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "tie_word_embeddings": tied,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "use_cache": True,
        "dtype": dtype,
    }
    vision = {
        "model_type": "qwen3_5", "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
        "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": hidden, "num_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [], "initializer_range": 0.02, "dtype": dtype,
    }
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tied,
        "dtype": dtype,
    }


def _write_side_files(folder: Path, ids: dict[str, int]) -> None:
    generation = {
        "do_sample": True, "temperature": 1.0, "top_k": 20, "top_p": 0.95,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"],
    }
    images = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }
    videos = {**images, "video_processor_type": "Qwen3VLVideoProcessor",
              "size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    del videos["image_processor_type"]
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "preprocessor_config.json", images)
    _write_json(folder / "video_preprocessor_config.json", videos)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Returns every tensor of the checkpoint in float32, drawn by name order from one generator.

    transformers' class supplies names and shapes. Values follow the initialisation of the GatedDeltaNet paper's code
    rather than transformers' (which forgets within one token), and norms are drawn around one instead of being exactly
    one: a leak between documents, or a dropped norm, shows in the logits.
    """
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    with torch.device("meta"):
        shell = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config))
    shapes = {name: tuple(t.shape) for name, t in shell.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    shapes |= mtp_shapes(config["text_config"])
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, generator) for name, shape in sorted(shapes.items())}


def _dtype(name: str) -> torch.dtype:
    import torch

    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    leaf = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if leaf == "A_log":
        return (1 + 15 * uniform).log()
    if leaf == "dt_bias":  # softplus(dt_bias) is log-uniform in [0.001, 0.1]
        dt = torch.exp(torch.log(torch.tensor(1e-3)) + uniform * torch.log(torch.tensor(100.0)))
        return dt + torch.log(-torch.expm1(-dt))
    if name.endswith(".bias"):
        return 0.02 * normal
    if leaf == "conv1d":
        return uniform - 0.5  # PyTorch's bound for a kernel of 4, 1 / sqrt(4)
    if "norm" in leaf:
        # The GDN's inner norm and the vision tower's multiply by w, all others by 1 + w.
        plain = ".visual." in name or ".linear_attn.norm." in name
        return 0.1 * normal + (1.0 if plain else 0.0)
    if leaf in ("embed_tokens", "lm_head"):
        # The final norm bounds a logit by sqrt(hidden) * |row|; at 0.02 that is 5, too little for an adapter ever to
        # become sure of a token among thousands (its loss ended at 3.2). At 0.06 the bound is 15.
        return 0.06 * normal
    return 0.02 * normal


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], sharded: bool) -> None:
    from safetensors.torch import save_file

    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    _write_json(folder / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


if __name__ == "__main__":
    print(make_model(Path(sys.argv[1]), pretrained=True))
