"""The verification bench: a dense Qwen-shape model of 28 layers on synthetic tokens, three ways.

usage: python -m lab.training_loop.qwen_minimal_bench --mode lora | full-bf16

No SSM, no vision encoder, no chat template: what remains is the kernels and the loop. Rows:

    Baseline v0   transformers (+ PEFT), a loop over its eager modules with gradient checkpointing
    Path A        the same, tuned drop-in: no checkpointing, a fused optimiser
    Path B        our loop with fused kernels (the native engine)

Path B's loss and gradient norm are first compared with transformers in float32 on the same weights and tokens; on red
nothing is timed and the exit code is 1. Without a CUDA GPU the exit code is 3.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["QWEN_28", "Agreement", "Shape", "agree", "compare", "main"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense Qwen3 model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


QWEN_28 = Shape(layers=28, hidden=2048, ffn=6144, heads=16, kv_heads=8, head_dim=128, vocab=151_936)
ROWS = ("baseline", "path-a", "path-b")
NAMES = {"baseline": "Baseline v0", "path-a": "Path A (drop-in tuning)", "path-b": "Path B (our loop, fused kernels)"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOSS_LIMIT = 2e-3
NORM_LIMIT = 0.03


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Loss and gradient norm of one micro-batch: ours, transformers in the compute type, transformers in float32."""

    loss: float
    peer_loss: float
    true_loss: float
    norm: float
    peer_norm: float
    true_norm: float

    def complaint(self) -> str:
        """Returns what is wrong with ours, empty when nothing is.

        Ours may be as far from float32 as 1.5 times plain transformers is, or within a floor of bf16 noise.
        """
        # `not <=` rather than `>`, so that NaN is wrong
        if not abs(self.loss - self.true_loss) <= max(1.5 * abs(self.peer_loss - self.true_loss), LOSS_LIMIT):
            return f"the loss is {self.loss:.6f}; float32 says {self.true_loss:.6f}, bf16 {self.peer_loss:.6f}"
        away, peer_away = (abs(n / self.true_norm - 1) for n in (self.norm, self.peer_norm))
        if not away <= max(1.5 * peer_away, NORM_LIMIT):
            return f"the gradient norm is {self.norm:.4f}; float32 says {self.true_norm:.4f}, bf16 {self.peer_norm:.4f}"
        return ""


def make_dense(folder: Path, shape: Shape, device: str) -> Path:
    """Writes a random bf16 model of this shape (once) and returns its folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=32_768, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    return folder


def native_engine(folder: Path, *, full: bool, rank: int, dtype: str, device: str) -> Any:
    """Returns our engine on the bench's model."""
    import torch

    from sparktune.setup.plan.models import probe
    from sparktune.setup.plan.schema import Plan
    from sparktune.training.native_engine import NativeEngine

    plan = Plan(
        model=str(folder), mode="full" if full else "lora", dtype=dtype, device=device, recompute="none", lora_r=rank,
        lora_alpha=float(rank), target_modules=TARGETS, weight_decay=0.01, max_grad_norm=0.0,
    )
    return NativeEngine.build(plan, probe(str(folder)), folder, torch.device(device))


def peer_model(folder: Path, *, full: bool, rank: int, dtype: str, device: str, adapter: Path | None = None) -> Any:
    """Returns transformers' model (with PEFT's adapters unless `full`), in training mode."""
    import torch
    from transformers import Qwen3ForCausalLM

    model: Any = Qwen3ForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).to(device)
    model.config.use_cache = False
    if not full:
        from peft import LoraConfig, PeftModel, get_peft_model

        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        else:
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    return model.train()


def synthetic_rows(tokens: int, accum: int, shape: Shape, device: str) -> list[tuple[Any, Any]]:
    """Returns `accum` documents (ids [T], labels [T]); every token but the first is supervised."""
    import torch

    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, shape.vocab, (tokens,), generator=generator).to(device) for _ in range(accum)]
    return [(ids, torch.cat((ids.new_full((1,), -100), ids[1:]))) for ids in rows]


def compare(folder: Path, shape: Shape, *, full: bool, rank: int, dtype: str, device: str, tokens: int) -> Agreement:
    """Runs one micro-batch through all three: ours, transformers in `dtype`, transformers in float32.

    The adapters are the same, with a B that is not zero, so that every gradient counts.
    """
    import torch

    from sparktune.lab.native import documents_row

    rows = synthetic_rows(tokens, 1, shape, "cpu")
    batch = documents_row(rows)
    engine = native_engine(folder, full=full, rank=rank, dtype=dtype, device=device)
    if not full:  # one step away from the start, where B is zero
        engine.forward_backward([batch], batch.supervised_tokens)
        engine.optimiser_step(1e-3)
    with tempfile.TemporaryDirectory() as temporary:
        adapter = None
        if not full:
            adapter = Path(temporary) / "adapter"
            engine.export(adapter)
        loss = float(engine.forward_backward([batch], batch.supervised_tokens))
        norm = float(engine.optimiser_step(0.0))
        del engine
        found = []
        for peer_dtype in (dtype, "float32"):
            free()
            model = peer_model(folder, full=full, rank=rank, dtype=peer_dtype, device=device, adapter=adapter)
            out = model(input_ids=rows[0][0][None].to(device), labels=rows[0][1][None].to(device)).loss
            out.backward()
            squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
            found.append((float(out.detach()), float(torch.stack(squares).sum().sqrt())))
            del model, out, squares
    free()
    return Agreement(
        loss=loss, norm=norm, peer_loss=found[0][0], peer_norm=found[0][1], true_loss=found[1][0],
        true_norm=found[1][1],
    )


def free() -> None:
    """Gives the memory of a model that is gone back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_of(row: str, folder: Path, shape: Shape, options: argparse.Namespace) -> Callable[[], Any]:
    """Returns a function that runs one optimiser step of a row."""
    import torch

    full, documents = options.mode == "full-bf16", synthetic_rows(options.tokens, options.accum, shape, "cuda")
    rate = 1e-5 if full else 2e-4
    if row == "path-b":
        from sparktune.lab.native import documents_row

        engine = native_engine(folder, full=full, rank=options.rank, dtype="bfloat16", device="cuda")
        batches = [documents_row([(ids.cpu(), labels.cpu())]).to(torch.device("cuda")) for ids, labels in documents]
        total = sum(batch.supervised_tokens for batch in batches)

        def ours() -> Any:
            loss = engine.forward_backward(batches, total)
            engine.optimiser_step(rate)
            return loss

        return ours
    model = peer_model(folder, full=full, rank=options.rank, dtype="bfloat16", device="cuda")
    if row == "baseline":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not full:
            model.enable_input_require_grads()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=rate, weight_decay=0.01, foreach=False, fused=row == "path-a")

    def theirs() -> Any:
        loss_sum = torch.zeros((), device="cuda")
        for ids, labels in documents:
            loss = model(input_ids=ids[None], labels=labels[None]).loss / len(documents)
            loss.backward()
            loss_sum += loss.detach()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss_sum

    return theirs


def agree(options: argparse.Namespace, folder: Path, shape: Shape) -> bool:
    """Prints the comparison and returns whether Path B may be timed."""
    found = compare(
        folder, shape, full=options.mode == "full-bf16", rank=options.rank, dtype="bfloat16", device="cuda",
        tokens=min(512, options.tokens),
    )
    complaint = found.complaint()
    print(f"check: {'RED: ' + complaint if complaint else 'green'} {asdict(found)}", flush=True)
    return not complaint


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="qwen_minimal_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=("lora", "full-bf16"), required=True)
    parser.add_argument("--tokens", type=int, default=5120, help="tokens of a micro-batch, one document")
    parser.add_argument("--accum", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--layers", type=int, default=QWEN_28.layers)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rows", type=lambda s: s.split(","), default=list(ROWS), help="of " + ",".join(ROWS))
    parser.add_argument("--folder", type=Path, help="where the random model is kept")
    parser.add_argument("--csv", type=Path, default=Path("docs/results/qwen_minimal_bench.csv"))
    options = parser.parse_args(argv)
    unknown = [row for row in options.rows if row not in ROWS]
    if unknown:
        parser.error(f"--rows takes {', '.join(ROWS)}; got {', '.join(unknown)}")
    return options


def main() -> int:
    """Checks, times the rows, prints a table, appends to the CSV."""
    options = parse()

    from sparktune.lab.measure import EXIT_NO_GPU, append_row, lacks_gpu, measure_steps

    if lacks_gpu("The verification bench"):
        return EXIT_NO_GPU
    from sparktune.setup.plan.rundir import cache_dir

    shape = replace(QWEN_28, layers=options.layers)
    folder = make_dense(options.folder or cache_dir("bench") / f"dense-{shape.layers}", shape, "cuda")
    if not agree(options, folder, shape):
        print("Path B does not agree with transformers, so nothing is timed.", file=sys.stderr)
        return 1
    first = None
    print(f"{'row':34s} {'step ms':>9s} {'tok/s':>9s} {'reserved GiB':>13s} {'speed-up':>9s}")
    for row in options.rows:
        free()
        step = step_of(row, folder, shape, options)
        times = measure_steps(NAMES[row], step, options.tokens * options.accum, warmup=options.warmup,
                              steps=options.steps)
        first = first or times.tok_per_s
        print(f"{NAMES[row]:34s} {times.step_ms_p50:9.1f} {times.tok_per_s:9,.0f} {times.reserved_gib:13.2f} "
              f"{times.tok_per_s / first:8.2f}x", flush=True)
        append_row(options.csv, times, bench="qwen_minimal_bench", mode=options.mode, layers=shape.layers,
                   tokens=options.tokens, accum=options.accum, rank=options.rank if options.mode == "lora" else 0)
        del step
    return 0


if __name__ == "__main__":
    sys.exit(main())
