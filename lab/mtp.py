"""The MTP head on a GPU: training speed and memory, and speculative decoding against plain decoding.

usage: python -m sparktune.lab.mtp [--size 2B] [--pack 8192] [--out docs/results/mtp.csv]

Decoding comes first, and with `--only decode` no file is written. Before training is timed, the fused step's loss and
gradient are compared with the references in float32 on the same weights and tokens, and the base's replayed pass with
its plain one; on red no step is timed and the exit code is 1. Weights and tokens are random: wall times are what they
measure. A random head's drafts are never right, so speculative decoding is timed at both ends of what acceptance can
do, the head's own cost included: every draft right, and none. In float32 the texts must be plain decoding's, token for
token, or the exit code is 1; bf16 rounds passes of other shapes differently, and random weights make near ties common.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from sparktune.kernels.select import reference_ops, select_ops
from sparktune.lab.measure import EXIT_NO_GPU, lacks_gpu, machine_row
from sparktune.lab.shapes import SIZES, make_model, text_config
from sparktune.lab.table import append_rows
from sparktune.mtp.acceptance import Answer
from sparktune.mtp.head import MtpHead
from sparktune.mtp.losses import LossKind
from sparktune.mtp.speculative import Decoded, Drafter, HeadDrafter, speculate
from sparktune.mtp.train_mtp import load_tower
from sparktune.mtp.trainer import HeadTrainer, Recipe
from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.models import probe
from sparktune.training.batch import MicroBatch
from sparktune.training.graphs import ForwardGraphs
from sparktune.training.model import build_model, load_weights
from sparktune.training.packing import PackPlan
from sparktune.training.tower import TextTower

__all__ = ["main", "random_head"]

LOSS_LIMIT, GRADIENT_LIMIT = 5e-3, 0.02
REPLAY_LIMIT = 1e-3
"""The same kernels over the same rows; another grid may add in another order."""


def random_head(tower: TextTower, seed: int = 0) -> MtpHead:
    """Returns a head of random weights, the same for every type and device."""
    head = MtpHead(tower.spec, tower.ops, dtype=tower.dtype, device=tower.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in head.named_parameters():
            scale = 0.1 if "norm" in name else 0.02
            p.copy_((scale * torch.randn(p.shape, generator=generator)).to(torch.bfloat16))
    return head


def documents(tokens: int, supervised: float, vocabulary: int, seed: int) -> TokenDataset:
    """Returns random examples of 400 to 3,000 tokens, the last `supervised` share of each learned."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(rng.integers(400, 3000)))
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    flags = np.zeros(offsets[-1], dtype=np.uint8)
    for end, length in zip(offsets[1:], lengths, strict=True):
        flags[end - int(length * supervised) : end] = 1
    ids = rng.integers(3, vocabulary - 1000, offsets[-1]).astype(np.uint32)
    return TokenDataset(ids, flags, offsets, np.arange(1, len(lengths) + 1, dtype=np.int64), f"random-{seed}")


def rows_of(tower: TextTower, pack: int, supervised: float, count: int) -> list[MicroBatch]:
    """Returns `count` padded micro-batches of one pack each."""
    data = documents(pack * (count + 1), supervised, tower.spec.vocab_size, seed=5)
    packs = PackPlan(data, pack=True, pack_length=pack, seed=1, pad=True)
    return [packs.micro_batch(0, i) for i in range(min(count, len(packs)))]


def _loss_and_gradients(
    tower: TextTower, batch: list[MicroBatch], kind: LossKind, lm_head_opt: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = HeadTrainer(tower, random_head(tower), Recipe(loss=kind, lm_head_opt=lm_head_opt))
    loss = float(trainer.forward_backward(batch))
    return loss, {n: g.float() for n, g in trainer.named_gradients() if g is not None}


def plain_towers(folder: Path, tower: TextTower) -> list[TextTower]:
    """Returns the same model on the references, in the bench's type and in float32."""
    spec, made = probe(str(folder)), []
    for dtype in (tower.dtype, torch.float32):
        made.append(build_model(spec, reference_ops(), dtype, tower.device))
        load_weights(made[-1], folder, spec)
    return made


def check(tower: TextTower, plain: list[TextTower], kind: LossKind) -> str:
    """Returns what is wrong with the fused step, empty when nothing is.

    Ours may be as far from float32 as 1.5 times the references in our type are, or within a floor of its noise. The
    others take neither our kernels nor our blocks of logits.
    """
    batch = rows_of(tower, 1024, 0.5, 1)
    loss, mine = _loss_and_gradients(tower, batch, kind, True)
    (peer_loss, peer), (true_loss, true) = (_loss_and_gradients(t, batch, kind, False) for t in plain)
    # `not <=` rather than `>`, so that NaN is wrong
    if not abs(loss - true_loss) <= max(1.5 * abs(peer_loss - true_loss), LOSS_LIMIT * max(abs(true_loss), 1.0)):
        return f"{kind}: the loss is {loss:.6f}; float32 says {true_loss:.6f}, plain bf16 {peer_loss:.6f}"
    worst = 0.0
    for name, want in true.items():
        error, peer_error = (float((g[name] - want).norm() / want.norm()) for g in (mine, peer))
        worst = max(worst, error)
        if not error <= max(1.5 * peer_error, GRADIENT_LIMIT):
            return f"{kind}: the gradient of {name} is {error:.1%} away from float32's, plain bf16's {peer_error:.1%}"
    print(f"check {kind}: loss {loss:.6f}, float32 {true_loss:.6f}; gradients at most {worst:.2%} from float32's",
          flush=True)
    return ""


@torch.no_grad()
def check_graph(tower: TextTower, pack: int) -> str:
    """Returns what is wrong with the base's replayed pass over packings other than the captured one."""
    rows, graphs = [r.to(tower.device) for r in rows_of(tower, pack, 0.3, 4)], ForwardGraphs(tower)
    if graphs.objection:
        return graphs.objection
    worst = 0.0
    for row in (rows[0], rows[1], *rows):
        graph, want = graphs.find(row), tower(row).float()
        if graph is not None:
            # real rows: the padding document's are nobody's
            far = (graph.forward(row).float() - want)[: row.real_tokens].norm() / want[: row.real_tokens].norm()
            worst = max(worst, float(far))
            if not far <= REPLAY_LIMIT:
                return f"the replayed pass is {float(far):.2%} away from the plain one"
    print(f"check graph: replayed passes at most {worst:.4%} from plain ones", flush=True)
    return "" if graphs.find(rows[0]) is not None else "no pass was captured"


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Gives seconds and the peak of the block it surrounds."""
    found: dict[str, float] = {}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield found
    if on_gpu:
        torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - start
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0


def train_speed(
    tower: TextTower, pack: int, supervised: float, recipe: Recipe, warmup: int, steps: int
) -> dict[str, Any]:
    """Returns one row: tokens a second of whole optimiser steps, one pack each, and the peak."""
    batches = rows_of(tower, pack, supervised, 4)
    trainer = HeadTrainer(tower, random_head(tower), recipe)
    for i in range(warmup):
        loss = trainer.step([batches[i % len(batches)]], 1e-5)
    times, tokens = [], 0
    with clocked() as whole:
        for i in range(steps):
            batch = batches[i % len(batches)]
            start = time.perf_counter()
            loss = trainer.step([batch], 1e-5)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
            tokens += batch.real_tokens
    times.sort()
    return {
        "what": "train", "pack": pack, "supervised_share": supervised, "loss": recipe.loss, "drafts": recipe.depth,
        "lm_head_opt": recipe.lm_head_opt, "tok_per_s": round(tokens / whole["seconds"]),
        "ms_p20": round(times[len(times) // 5], 2), "ms_p50": round(times[len(times) // 2], 2),
        "ms_p80": round(times[len(times) * 4 // 5], 2), "peak_gib": round(whole["peak_gib"], 2),
        "reserved_gib": round(whole["reserved_gib"], 2),
        "note": f"loss {float(loss):.4f}; all supervised logits would be "
                f"{batches[0].supervised_tokens * tower.spec.vocab_size * 2 / 2**30:.2f} GiB of bf16 a depth",
    }


def random_tower(size: str, device: torch.device, dtype: torch.dtype) -> TextTower:
    """Returns a tower of random weights, drawn where it lies: no file, no transformers."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
                  **text_config(size)}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        spec = probe(folder)
    # float32 is there to compare words with: the references in it, no tensor-core products
    ops = reference_ops() if dtype == torch.float32 else select_ops(device, dtype, spec)
    tower = build_model(spec, ops, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in tower.named_parameters():
            drawn = torch.empty_like(p).normal_(0, 0.02, generator=generator)
            p.copy_(drawn + 1 if "linear_attn.norm" in name else drawn)
    return tower.eval().requires_grad_(False)


def own_words(tower: TextTower, count: int, length: int) -> tuple[list[Answer], dict[str, Any]]:
    """Returns greedy continuations of random prompts, and the row of plain decoding."""
    rng = np.random.default_rng(3)
    prompts = [tuple(rng.integers(3, tower.spec.vocab_size // 2, 32).tolist()) for _ in range(count)]
    tower.generate(prompts[0], 2, ())
    with clocked() as whole:
        said = [Answer(prompt=p, answer=tuple(tower.generate(p, length, ()))) for p in prompts]
    return said, {"what": "decode", "note": f"{_dtype(tower)}, plain", "drafts": 0, "acceptance_length": 1.0,
                  **_decoded(whole, count * length, count * length)}


def _dtype(tower: TextTower) -> str:
    return str(tower.dtype).removeprefix("torch.")


def _decoded(whole: dict[str, float], tokens: int, passes: int) -> dict[str, float]:
    return {"tok_per_s": round(tokens / whole["seconds"], 1), "ms_p50": round(whole["seconds"] * 1e3 / passes, 2),
            "peak_gib": round(whole["peak_gib"], 2), "reserved_gib": round(whole["reserved_gib"], 2)}


def drafter(tower: TextTower, head: MtpHead, answer: Answer, drafts: int, *, right: bool) -> Drafter:
    """Returns the head's drafter with its work done and its words replaced: the answer's own, or none of them."""
    real = HeadDrafter(tower, head, drafts, len(answer.prompt) + len(answer.answer))
    read = 0

    def draft(tokens: Sequence[int], hidden: torch.Tensor) -> list[int]:
        nonlocal read
        real(tokens, hidden)
        read += len(tokens) if read else 1
        following = answer.answer[read : read + drafts]
        return [t if right else (t + 1) % tower.spec.vocab_size for t in following]

    return draft


def decode_rows(tower: TextTower, head: MtpHead, said: list[Answer], drafts: int) -> Iterator[dict[str, Any]]:
    """Gives the rows of speculative decoding: every draft right, and none."""
    length = len(said[0].answer)
    for name, right in (("every draft right", True), ("no draft right", False)):
        def method(a: Answer, most: int = length, right: bool = right) -> Decoded:
            return speculate(tower, drafter(tower, head, a, drafts, right=right), a.prompt, most, (), drafts)

        method(said[0], 4)
        with clocked() as whole:
            done = [method(a) for a in said]
        same = sum(tuple(d.tokens) == a.answer for d, a in zip(done, said, strict=True))
        rounds, kept = sum(len(d.rounds) for d in done), sum(sum(d.rounds) for d in done)
        yield {
            "what": "decode", "note": f"{_dtype(tower)}, speculative, {name}; {same} of {len(said)} texts token for "
                                      "token those of plain decoding",
            "same": same, "drafts": drafts, "acceptance_length": round(1 + kept / rounds, 3),
            **_decoded(whole, sum(len(d.tokens) for d in done), sum(d.passes for d in done)),
        }


_COLUMNS = ("gpu", "torch", "triton", "transformers", "commit", "date", "size", "what", "pack", "supervised_share",
            "loss", "drafts", "lm_head_opt", "tok_per_s", "ms_p20", "ms_p50", "ms_p80", "acceptance_length", "peak_gib",
            "reserved_gib", "note")


def append(path: Path, size: str, row: dict[str, Any]) -> None:
    """Prints a row and appends it to the CSV."""
    print({k: v for k, v in row.items() if v is not None}, flush=True)
    known = {**machine_row(), "size": size, **row}
    append_rows(path, [{column: known.get(column) for column in _COLUMNS}])


def main(argv: list[str] | None = None) -> int:
    """Runs the bench. Returns 0, 1 when a check is red, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.lab.mtp", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="2B")
    parser.add_argument("--pack", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=["decode", "train"], help="half of the bench")
    parser.add_argument("--model", type=Path, help="folder of the random model (made if missing)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/mtp.csv"))
    args = parser.parse_args(argv)
    if lacks_gpu("This bench"):
        return EXIT_NO_GPU
    device = torch.device("cuda", 0)
    if args.only != "train" and not _decode(args, device):
        return 1
    if args.only == "decode":
        return 0
    folder = make_model(args.model or Path(tempfile.gettempdir()) / f"sparktune-{args.size}", args.size)
    return _train_rows(args, folder, load_tower(folder, device))


def _decode(args: argparse.Namespace, device: torch.device) -> bool:
    """Appends the rows of decoding. Returns whether every text in float32 was plain decoding's."""
    for dtype in (torch.float32, torch.bfloat16):
        tower = random_tower(args.size, device, dtype)
        said, row = own_words(tower, 2, 64)
        append(args.out, args.size, row)
        for row in decode_rows(tower, random_head(tower), said, 2):
            append(args.out, args.size, row)
            if dtype == torch.float32 and row["same"] != len(said):
                print("RED: in float32 a speculative text is not plain decoding's.", file=sys.stderr)
                return False
        del tower
    return True


def _train_rows(args: argparse.Namespace, folder: Path, tower: TextTower) -> int:
    plain = plain_towers(folder, tower)
    wrong = check_graph(tower, args.pack)
    for kind in get_args(LossKind):
        wrong = wrong or check(tower, plain, kind)
    if wrong:
        print(f"RED: {wrong}. No step was timed.", file=sys.stderr)
        return 1
    del plain
    torch.cuda.empty_cache()
    base = Recipe()
    for share, recipe in ((0.3, base), (1.0, base), (0.3, replace(base, loss="lk")), (0.3, replace(base, loss="hard"))):
        append(args.out, args.size, train_speed(tower, args.pack, share, recipe, 6, args.steps))
    append(args.out, args.size, train_speed(tower, args.pack, 0.3, replace(base, lm_head_opt=False), 4, 4))
    return 0


if __name__ == "__main__":
    sys.exit(main())
