"""Trains the MTP head of a fine-tuned Qwen3.5 so that it drafts what this model says.

    python -m sparktune.mtp.train_mtp --model output/RUN --data rows.jsonl --out head.safetensors

The head starts from the model's own one (or --head). The model itself is frozen and teaches: by default the head learns
the model's distribution (KL) at the positions of the answers, two drafts deep, for one pass over the data. A second
start of the same command goes on from the last checkpoint in --work and ends with the same bits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from sparktune.mtp.extract_upstream_mtp import find_head
from sparktune.mtp.head import load_head
from sparktune.mtp.losses import LossKind
from sparktune.mtp.tensors import Place
from sparktune.mtp.trainer import HeadTrainer, Recipe
from sparktune.setup.data.cache import TokenDataset
from sparktune.setup.plan.errors import ExitCode, SparktuneError, StoppedResumable, UsageError
from sparktune.setup.plan.events import EventWriter, NullEvents
from sparktune.setup.plan.intervals import tenth
from sparktune.setup.plan.models import probe, resolve_model_dir
from sparktune.setup.plan.weights import safetensors_header
from sparktune.training import checkpoint as checkpoints
from sparktune.training.checkpoint import LoopState
from sparktune.training.gpu_lock import hold_gpu
from sparktune.training.memory import peak_gib, reset_peak
from sparktune.training.model import TextTower, build_model, load_weights
from sparktune.training.packing import PackPlan
from sparktune.training.schedule import learning_rate, run_length, warmup_length
from sparktune.training.stop import StopRequest

__all__ = ["HeadRun", "choose_pack_length", "load_tower", "train_head"]

PACK_LENGTH = 8192
LEAST_STEPS = 32
_LEAST_PACK = 128
_KEEP = 2


@dataclass(frozen=True, kw_only=True)
class HeadRun:
    """One training of a head."""

    model_dir: Path
    """The fine-tuned model, merged."""
    head: Mapping[str, Place]
    """Where the head starts."""
    source: str
    """What messages call that head."""
    out: Path
    """safetensors file to write; an existing one is replaced."""
    work: Path
    """Folder of checkpoints and metrics.jsonl."""
    recipe: Recipe = field(default_factory=Recipe)
    num_epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.05
    pack_length: int | None = None
    """Tokens of a pack; None: 8,192, or less where the data is small (`choose_pack_length`)."""
    save_steps: int | None = None
    """Steps between checkpoints; a tenth of the run when left out."""
    seed: int = 3407


def choose_pack_length(lengths: list[int]) -> int:
    """Returns 8,192, or less where that would give fewer than 32 steps a pass; a pack is a step.

    Args:
        lengths: tokens of each example.
    """
    wanted = -(-sum(lengths) // LEAST_STEPS)
    return max(_LEAST_PACK, min(PACK_LENGTH, max(wanted, max(lengths, default=1))))


def load_tower(model_dir: Path, device: torch.device) -> TextTower:
    """Loads a model for drafting: bfloat16 with the fused ops on a GPU, float32 with the references on a CPU."""
    from sparktune.kernels.select import select_ops

    spec = probe(str(model_dir))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tower = build_model(spec, select_ops(device, dtype, spec), dtype, device)
    load_weights(tower, model_dir, spec)
    return tower.eval().requires_grad_(False)


def _maths(run: HeadRun, pack_length: int, data: TokenDataset, tower: TextTower) -> dict[str, Any]:
    head = [f"{name} {file.stat().st_size} {entry.begin}" for name, (file, entry) in sorted(run.head.items())]
    # A model that was merged anew under the same name is another teacher.
    files = sorted(run.model_dir.glob("*.safetensors"))
    weights = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    return {
        **asdict(run.recipe), "num_epochs": run.num_epochs, "max_steps": run.max_steps, "seed": run.seed,
        "learning_rate": run.learning_rate, "warmup_ratio": run.warmup_ratio, "pack_length": pack_length,
        "data": data.key, "model": str(run.model_dir.resolve()), "weights": weights, "head": head,
        "dtype": str(tower.dtype), "device": tower.device.type,
    }


def train_head(
    run: HeadRun, data: TokenDataset, tower: TextTower, events: EventWriter, stop: StopRequest | None = None
) -> Path:
    """Trains a head and writes it to `run.out`, which appears by rename. Goes on from `run.work` where it can.

    Args:
        run: what to do.
        data: tokenised examples; only positions of answers teach.
        tower: the fine-tuned model (`load_tower(run.model_dir, ...)`).
        events: progress, metrics and messages.
        stop: asked after every step.

    Returns:
        `run.out`.

    Raises:
        UsageError: the head is not one of this model, or there is nothing to learn from.
        StoppedResumable: a stop was asked for; a checkpoint was written.
        SparktuneError: the loss is no number, or a checkpoint cannot be read or written.
    """
    lengths = data.lengths.tolist()
    if not lengths or not int(data.supervised_counts.sum()):
        raise UsageError("The data has no answer to learn from: no token is supervised. Give --data with answers.")
    if tower.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    head = load_head(tower, run.head, run.source)
    trainer = HeadTrainer(tower, head, run.recipe)
    pack_length = run.pack_length or choose_pack_length(lengths)
    packs = PackPlan(data, pack=True, pack_length=pack_length, seed=run.seed, pad=tower.device.type == "cuda")
    length = run_length(len(packs), 1, run.num_epochs, run.max_steps)
    run.work.mkdir(parents=True, exist_ok=True)
    state = _resume(run, trainer, _maths(run, pack_length, data, tower), events)
    events.choice("mtp attention", head.reason.split(",")[0].split(":")[0], head.reason)
    events.message(
        f"MTP head: {length.total_steps} steps, {packs.describe()} Loss {run.recipe.loss}, {run.recipe.depth} drafts, "
        f"learning rate {run.learning_rate:g}."
    )
    reset_peak(tower.device)
    _loop(run, trainer, packs, length.total_steps, state, events, stop)
    partial = run.out.with_name(run.out.name + ".partial")
    run.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_safetensors(partial, dict(sorted(trainer.tensors().items())))
    partial.rename(run.out)
    return run.out


def _resume(run: HeadRun, trainer: HeadTrainer, maths: dict[str, Any], events: EventWriter) -> LoopState:
    checkpoints.remove_leftovers(run.work)
    found = checkpoints.newest_valid(run.work, lambda text: events.message(text, "warning"))
    if found is None:
        return LoopState(maths=maths)
    state = checkpoints.load_loop_state(found)
    if state.maths != maths:
        changed = sorted(k for k in maths.keys() | state.maths.keys() if maths.get(k) != state.maths.get(k))
        for old in checkpoints.checkpoints_of(run.work):
            checkpoints.set_aside(old, "superseded")
        events.message(f"{found} was made with other settings ({', '.join(changed)}): it is set aside, and the head "
                       "starts anew.", "warning")
        return LoopState(maths=maths)
    trainer.load_state(checkpoints.load_engine_state(found))
    events.message(f"The MTP head goes on from {found.name}.")
    return state


def _loop(
    run: HeadRun, trainer: HeadTrainer, packs: PackPlan, total: int, state: LoopState, events: EventWriter,
    stop: StopRequest | None,
) -> None:
    save_every, warmup = tenth(run.save_steps, total), warmup_length(total, run.warmup_ratio, None)
    path = run.work / "metrics.jsonl"
    with path.open("ab") as log:
        log.truncate(state.metrics_bytes)
        following = packs.micro_batch(*divmod(state.step, len(packs)))
        while state.step < total:
            started = time.perf_counter()
            batch = following
            rate = learning_rate(state.step + 1, peak=run.learning_rate, total_steps=total, warmup=warmup,
                                 shape="cosine")
            waiting = trainer.step([batch], rate)
            if state.step + 1 < total:  # laid out while the device computes
                following = packs.micro_batch(*divmod(state.step + 1, len(packs)))
            loss = float(waiting)
            if loss != loss:
                raise SparktuneError(f"The MTP head's loss is no number at step {state.step + 1}. Lower "
                                     f"--mtp-learning-rate (now {run.learning_rate:g}).")
            state.step += 1
            state.position += 1
            state.tokens += batch.real_tokens
            row = {
                "step": state.step, "loss": loss, "lr": rate, "tokens": batch.real_tokens,
                "tok_per_s": round(batch.real_tokens / (time.perf_counter() - started), 1),
                "peak_gib": round(peak_gib(trainer.tower.device), 3),
            }
            log.write(json.dumps(row).encode() + b"\n")
            log.flush()
            state.metrics_bytes = log.tell()
            events.progress("MTP head", state.step, total, "steps")
            stopping = stop is not None and stop.requested
            if state.step < total and (stopping or state.step % save_every == 0):
                save(run.work, trainer, state)
            if stopping and state.step < total:
                raise StoppedResumable(
                    f"Stopped as you asked after step {state.step} of {total} of the MTP head; start it again to go on."
                )


def save(work: Path, trainer: HeadTrainer, state: LoopState) -> None:
    """Writes a checkpoint and keeps the newest ones."""
    def export(folder: Path) -> None:
        folder.mkdir()
        checkpoints.write_safetensors(folder / "head.safetensors", trainer.tensors())

    checkpoints.save_checkpoint(work, state, trainer.state(), export, "head")
    checkpoints.rotate(work, _KEEP, set())


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m sparktune.mtp.train_mtp", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="the fine-tuned model's folder")
    p.add_argument("--data", required=True, type=Path, help="JSONL, as for training")
    p.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    p.add_argument("--head", type=Path, help="file or folder of the starting head (default: the model's own)")
    p.add_argument("--work", type=Path, help="folder of checkpoints (default: OUT.work)")
    p.add_argument("--num-epochs", type=float, default=1.0, help="passes over the data (default: %(default)s)")
    p.add_argument("--max-steps", type=int, help="optimiser steps instead of passes")
    p.add_argument("--learning-rate", type=float, default=5e-5, help="peak (default: %(default)s)")
    p.add_argument("--pack-length", type=int, help=f"tokens a step (default: {PACK_LENGTH}, less for small data)")
    p.add_argument("--depth", type=int, default=2, choices=range(1, 5), help="drafts (default: %(default)s)")
    p.add_argument("--loss", default="kl", choices=get_args(LossKind), help="default: %(default)s")
    p.add_argument("--lm-head-opt", action=argparse.BooleanOptionalAction, default=True,
                   help="logits block by block, never all at once (default: on)")
    p.add_argument("--save-steps", type=int, help="steps between checkpoints (default: a tenth of the run)")
    p.add_argument("--max-seq-length", type=int, default=5376, help="longest example (default: %(default)s)")
    p.add_argument("--seed", type=int, default=3407)
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return p


def head_of(source: Path) -> Mapping[str, Place]:
    """Returns the `mtp.*` tensors of a safetensors file or of a model folder."""
    return find_head(source) if source.is_dir() else {n: (source, e) for n, e in safetensors_header(source).items()}


def _main(args: argparse.Namespace, stop: StopRequest, say: Callable[[str], None]) -> None:
    from sparktune.setup.data.tokenise import prepare
    from sparktune.setup.data.tokenizer import load_tokenizer
    from sparktune.setup.plan.schema import Plan

    model_dir = resolve_model_dir(args.model)
    source = args.head or model_dir
    head = head_of(source)
    if not head:
        raise UsageError(f"{source} holds no mtp.* tensors. Take a head from the published base first: python -m "
                         "sparktune.mtp.extract_upstream_mtp --model HUB-ID --out FILE, then give --head FILE.")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if args.device == "cuda" and device.type != "cuda":
        raise UsageError("--device cuda needs a CUDA GPU; torch sees none. Use --device cpu.")
    plan = Plan(model=str(model_dir), data=args.data, eval_split=0.0, max_seq_length=args.max_seq_length)
    data = prepare(plan, probe(str(model_dir)), str(model_dir), NullEvents(), load_tokenizer(str(model_dir)))
    run = HeadRun(
        model_dir=model_dir, head=head, source=str(source), out=args.out,
        work=args.work or args.out.with_name(args.out.name + ".work"), num_epochs=args.num_epochs,
        recipe=Recipe(depth=args.depth, loss=args.loss, lm_head_opt=args.lm_head_opt), max_steps=args.max_steps,
        learning_rate=args.learning_rate, pack_length=args.pack_length, save_steps=args.save_steps, seed=args.seed,
    )
    stop.looping = True
    with hold_gpu(device, str(args.out)):
        train_head(run, data.train, load_tower(model_dir, device), _Printed(say), stop)
    say(f"Wrote {args.out}.")


class _Printed(NullEvents):
    """Events as lines for people."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, kind: Any, **fields: Any) -> None:
        """Prints messages, and progress ten times a run."""
        if kind == "message":
            self._say(str(fields["text"]))
        elif kind == "progress" and fields["done"] % max(1, fields["total"] // 10) == 0:
            self._say(f"{fields['phase']}: {fields['done']} of {fields['total']} {fields['unit']}")


def main(argv: list[str] | None = None) -> int:
    """Trains from a command line. Returns the exit code: 0, 75 after a stop with a checkpoint, or an error's."""
    args = _parser().parse_args(argv)
    stop = StopRequest()
    stop.install()
    try:
        _main(args, stop, lambda text: print(text, flush=True))
        return ExitCode.OK
    except SparktuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted; the last checkpoint is still good.", file=sys.stderr)
        return ExitCode.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
