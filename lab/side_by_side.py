"""Ours and the peers on the same random model, tokens, targets and supervised share: one process a variant.

usage: python -m lab.side_by_side make [--size 2B]
       python -m lab.side_by_side VARIANT [--size 2B] [--lengths 5376] [--accum 2] [--rank 128] [--csv FILE]
VARIANT: native, native_full, hf, hf_nogc, hf_full, unsloth, unsloth_nogc, unsloth_full, liger
Peers run as their trainers run them, under bf16 autocast. `--lengths A,B,...` lists the documents of a micro-batch:
ours lays them in one row without leaks; a peer gets each as a row of its own.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from sparktune.setup.plan.rundir import cache_dir

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant")
    parser.add_argument("--size", default="2B")
    parser.add_argument("--lengths", default="5376", help="documents of a micro-batch, comma-separated")
    parser.add_argument("--accum", type=int, default=2)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--supervised", type=float, default=0.35)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--folder", type=Path, default=cache_dir("bench"))
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--table", action="store_true", help="print the profile's most expensive kernels")
    return parser.parse_args()


def peer_model(a: argparse.Namespace, folder: Path) -> Any:
    """Returns a peer's model, ready to train."""
    from sparktune.lab.shapes import LORA_TARGETS

    full, checkpoint = "full" in a.variant, "nogc" not in a.variant
    if a.variant.startswith("unsloth"):
        import torch
        from unsloth import FastModel
        longest = max(int(n) for n in a.lengths.split(","))
        model, _ = FastModel.from_pretrained(str(folder), max_seq_length=longest, dtype=torch.bfloat16,
                                             load_in_4bit=False, full_finetuning=full)
        if not full:
            model = FastModel.get_peft_model(
                model, r=a.rank, lora_alpha=a.rank, lora_dropout=0, bias="none", target_modules=LORA_TARGETS,
                use_gradient_checkpointing="unsloth" if checkpoint else False, random_state=3407)
        return model
    import torch
    from transformers import Qwen3_5ForCausalLM
    if a.variant.startswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_5
        apply_liger_kernel_to_qwen3_5()
    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0},
                                               attn_implementation="sdpa")
    model.config.use_cache = False
    if not full:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=a.rank, lora_alpha=a.rank, target_modules=LORA_TARGETS))
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not full:
            model.enable_input_require_grads()
    return model


def peer_step(a: argparse.Namespace, folder: Path) -> Callable[[], Any]:
    """Returns a function that runs one optimiser step of a peer."""
    model = peer_model(a, folder)
    import torch

    from sparktune.lab.shapes import random_documents
    model.train()
    lengths = [int(n) for n in a.lengths.split(",")]
    micro = [random_documents(lengths, a.supervised, seed=7 + i) for i in range(a.accum)]
    rows = [(ids[None].cuda(), labels[None].cuda()) for m in micro for ids, labels in m]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-5 if "full" in a.variant else 2e-4, fused=True)
    n_supervised = sum(int((labels[:, 1:] != -100).sum()) for _, labels in rows)

    def step() -> torch.Tensor:
        total = torch.zeros((), device="cuda")
        for ids, labels in rows:
            share = int((labels[:, 1:] != -100).sum()) / n_supervised
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss * share
            loss.backward()
            total += loss.detach()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return total

    return step


def native_step(a: argparse.Namespace, folder: Path) -> Callable[[], Any]:
    """Returns a function that runs one optimiser step of the native engine."""
    import torch

    from sparktune.lab.native import build_engine, micro_batches
    engine = build_engine(folder, rank=a.rank, full="full" in a.variant, recompute=a.recompute)
    lengths = [int(n) for n in a.lengths.split(",")]
    batches = micro_batches(lengths, a.supervised, a.accum, torch.device("cuda"))
    n_supervised = sum(b.supervised_tokens for b in batches)

    def step() -> torch.Tensor:
        loss = engine.forward_backward(batches, n_supervised)
        engine.optimiser_step(1e-5 if "full" in a.variant else 2e-4)
        return loss

    return step


def main() -> None:
    """Runs one variant and prints its row."""
    a = parse()
    if a.variant.startswith("unsloth"):
        import_module("unsloth")  # it must come before transformers
    from sparktune.lab.measure import append_row, measure_steps, profile_step
    from sparktune.lab.shapes import make_model

    folder = make_model(a.folder / a.size, a.size)
    if a.variant == "make":
        return
    step = native_step(a, folder) if a.variant.startswith("native") else peer_step(a, folder)
    tokens = sum(int(n) for n in a.lengths.split(",")) * a.accum
    times = measure_steps(a.variant, step, tokens, warmup=a.warmup, steps=a.steps)
    if a.table:
        for name, ms, calls in profile_step(step)[2][:40]:
            print(f"{ms:9.3f} ms {calls:6d}  {name[:110]}", file=sys.stderr)
    if a.csv:
        append_row(a.csv, times, size=a.size, lengths=a.lengths, accum=a.accum, rank=a.rank,
                   supervised=a.supervised, recompute=a.recompute)
    print(json.dumps(asdict(times)))


if __name__ == "__main__":
    main()
