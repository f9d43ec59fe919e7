"""The lossless A/B rig: the same weights, data, order, optimiser and seed through several engines, loss by loss.

usage: python -m lab.lossless [--size 2B] [--lengths 700,613,771] [--steps 30] [--accum 1] [--seeds 7,8]
                              [--variants A,B] [--csv FILE]
Variants: fp32 (our references in float32: the truth), fused (our kernels in bf16), reference (our references in bf16),
hf (transformers + PEFT, plain bf16), hf_fp32 (the same in float32, a check of the truth itself), unsloth (under bf16
autocast; run it beside fp32 only, because importing it changes what transformers computes).
Prints, for each variant, its largest and mean deviation of the loss from fp32, and some of the losses; the CSV has all.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from sparktune.kernels.select import reference_ops
from sparktune.lab.measure import EXIT_NO_GPU, command_row, lacks_gpu, machine_row
from sparktune.lab.native import build_engine, micro_batches
from sparktune.lab.shapes import make_model, random_documents
from sparktune.lab.table import append_rows
from sparktune.setup.plan.rundir import cache_dir

__all__ = ["main"]

Losses = list[float]


def native_losses(a: argparse.Namespace, folder: Path, variant: str) -> Losses:
    """Returns the losses of our engine."""
    engine = build_engine(folder, rank=a.rank, full=False, recompute="norms" if variant == "fused" else "none",
                          dtype="float32" if variant == "fp32" else "bfloat16",
                          ops=None if variant == "fused" else reference_ops())
    batches = micro_batches(a.lengths, a.supervised, a.accum, torch.device("cuda"), seed=a.seed)
    n_supervised = sum(b.supervised_tokens for b in batches)
    losses = []
    for step in range(a.steps):
        losses.append(engine.forward_backward(batches, n_supervised))
        if step == 0:
            check_first_gradients(engine.named_gradients())
        engine.optimiser_step(a.learning_rate)
    return [float(x) for x in losses]


def check_first_gradients(named: Iterable[tuple[str, torch.Tensor | None]]) -> None:
    """Raises if a gradient is missing or not finite; A's zero gradient while B is zero is expected."""
    wrong = [name for name, grad in named if grad is None or not bool(torch.isfinite(grad).all())]
    if wrong:
        raise SystemExit(f"no finite gradient at step 1: {wrong[:5]} and {max(0, len(wrong) - 5)} more")


def peer_losses(a: argparse.Namespace, folder: Path, variant: str) -> Losses:
    """Returns a peer's losses, a document a row, from the adapter that our engine starts with."""
    with tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter"
        engine = build_engine(folder, rank=a.rank, full=False, recompute="none", ops=reference_ops())
        engine.export(adapter)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        model = (unsloth_model if variant == "unsloth" else hf_model)(a, folder, variant, adapter)
    model.train()
    rows = [(ids[None].cuda(), labels[None].cuda()) for i in range(a.accum)
            for ids, labels in random_documents(a.lengths, a.supervised, seed=a.seed + i)]
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in rows]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=a.learning_rate, weight_decay=0.01, fused=True)
    losses = []
    for step in range(a.steps):
        total = torch.zeros((), device="cuda")
        for (ids, labels), count in zip(rows, counts, strict=True):
            with torch.autocast("cuda", torch.bfloat16, enabled=variant == "unsloth"):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss * (count / sum(counts))
            loss.backward()
            total += loss.detach()
        losses.append(total)
        if step == 0:
            check_first_gradients((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return [float(x) for x in losses]


def hf_model(a: argparse.Namespace, folder: Path, variant: str, adapter: Path) -> Any:
    """Returns transformers' model with PEFT's adapter, in bf16 or float32."""
    from peft import PeftModel
    from transformers import Qwen3_5ForCausalLM

    dtype = torch.float32 if variant == "hf_fp32" else torch.bfloat16
    base = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": 0}, attn_implementation="sdpa")
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


def unsloth_model(a: argparse.Namespace, folder: Path, variant: str, adapter: Path) -> Any:
    """Returns Unsloth's model, its adapter filled with ours.

    Raises:
        RuntimeError: a matrix of ours has no place in it.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from unsloth import FastModel

    from sparktune.lab.shapes import LORA_TARGETS

    model, _ = FastModel.from_pretrained(str(folder), max_seq_length=max(a.lengths), dtype=torch.bfloat16,
                                         load_in_4bit=False, full_finetuning=False)
    model = FastModel.get_peft_model(model, r=a.rank, lora_alpha=a.rank, lora_dropout=0, bias="none",
                                     target_modules=LORA_TARGETS, use_gradient_checkpointing=False)
    result = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        raise RuntimeError(f"the adapter does not fit Unsloth's model: unexpected {result.unexpected_keys[:3]}, "
                           f"missing {missing[:3]}.")
    return model


def one_seed(a: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Trains every variant on the documents of `a.seed`, prints the deviations and returns a row each."""
    losses = {}
    for variant in a.variants:
        losses[variant] = (peer_losses if variant.startswith(("hf", "unsloth")) else native_losses)(a, folder, variant)
        gc.collect()
        torch.cuda.empty_cache()
    truth = losses["fp32"]
    rows: list[dict[str, object]] = []
    for variant, values in losses.items():
        deviations = [abs(x - t) for x, t in zip(values, truth, strict=True)]
        rows.append({**machine_row(), "size": a.size, "lengths": "+".join(map(str, a.lengths)), "steps": a.steps,
                     "seed": a.seed, "variant": variant, "max_deviation": f"{max(deviations):.3e}",
                     "mean_deviation": f"{sum(deviations) / len(deviations):.3e}", "first_loss": f"{values[0]:.6f}",
                     "last_loss": f"{values[-1]:.6f}", "losses": json.dumps([round(x, 6) for x in values]),
                     "learning_rate": a.learning_rate, **command_row()})
        print(f"seed {a.seed} {variant:10s} max {max(deviations):.3e} mean {sum(deviations) / len(deviations):.3e}  "
              + " ".join(f"{x:.4f}" for x in values[:: max(1, len(values) // 8)]), flush=True)
    return rows


def main() -> None:
    """Runs the variants and prints their deviations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2B")
    parser.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=[700, 613, 771])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--accum", type=int, default=1)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--supervised", type=float, default=0.35)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=lambda s: [int(n) for n in s.split(",")], default=[7], help="of the documents")
    parser.add_argument("--variants", type=lambda s: s.split(","), default=["fp32", "fused", "reference", "hf"])
    parser.add_argument("--folder", type=Path, default=cache_dir("bench"))
    parser.add_argument("--csv", type=Path)
    a = parser.parse_args()
    if lacks_gpu("The lossless comparison"):
        sys.exit(EXIT_NO_GPU)
    if "unsloth" in a.variants:
        if any(variant.startswith("hf") for variant in a.variants):
            parser.error("unsloth and hf do not run in one process: Unsloth changes transformers when it is imported.")
        import_module("unsloth")  # it must come before transformers
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = make_model(a.folder / a.size, a.size)
    for seed in a.seeds:
        a.seed = seed
        rows = one_seed(a, folder)
        if a.csv:
            append_rows(a.csv, rows)


if __name__ == "__main__":
    main()
