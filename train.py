#!/usr/bin/env python3
"""One training run, from flags or a plan.yaml.

    python train.py --mode lora --train-data data.jsonl --num-epochs 3 --pack --pack-length 5120 --save-steps 200
    python train.py --resume-from-checkpoint results/lora-2026-01-31-120000/checkpoint-1200
    python train.py --config results/RUN/plan.yaml
    python train.py --gpus 4 ..., or torchrun --nproc-per-node 4 train.py ...

Exit codes: 0 done, 1 failure, 2 usage, 3 machine or model, 4 data, 5 memory, 75 stopped with a checkpoint, 130 aborted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def own_path() -> None:
    """Makes `sparktune` importable from the sources, and keeps our folder `kernels` from posing as a package.

    Python puts a script's folder first on sys.path; transformers would then take `kernels` for the Hugging Face one.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
    sys.path.insert(0, str(ROOT / "src"))


def main() -> int:
    """Parses the command line, trains, and returns the exit code."""
    own_path()
    import argparse

    from sparktune.setup.plan.flags import add_plan_flags, given_flags

    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=None, metavar="PATH", help="a plan.yaml, or a run's own one")
    parser.add_argument(
        "--rehearse", type=int, default=None, metavar="N",
        help="time N steps of the plan in --config, write calibration.json beside it, and keep nothing else",
    )
    parser.add_argument("--attempt", type=int, default=None, help=argparse.SUPPRESS)  # see training/warmth.py
    parser.add_argument("--node", default=None, metavar="I/N@HOST:PORT",
                        help="this is machine I of N, each with --gpus ranks; machine 0 is HOST")
    add_plan_flags(parser, "train")
    args = parser.parse_args()

    from sparktune.setup.plan.errors import SparktuneError
    from sparktune.training.compilers import private_compilers
    from sparktune.training.engine_choice import engine_of_command, load_unsloth
    from sparktune.training.warmth import Warmth, run_until_warm

    if args.rehearse is not None and args.attempt is None:
        if args.config is None:
            parser.error("--rehearse times a complete plan: give it as --config RUN/plan.yaml")
        return run_until_warm([sys.executable, *sys.orig_argv[1:]], args.config.resolve().parent / "calibration.json")
    warmth = Warmth(args.attempt) if args.rehearse is not None else None
    private_compilers(os.environ)
    flags = given_flags(args)
    if args.rehearse is None:
        from sparktune.training.launch import Node, gpus_of_command, launch

        gpus = gpus_of_command(flags, args.config, os.environ)
        if "WORLD_SIZE" not in os.environ and (gpus > 1 or args.node is not None):
            try:
                return launch(gpus, ROOT / "train.py", sys.argv[1:], None if args.node is None else Node.of(args.node))
            except SparktuneError as error:
                print(error, file=sys.stderr)
                return error.exit_code
    choice = None
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # several ranks train natively; no duel is fought by all at once
        choice = engine_of_command(flags, args.config, os.environ, ROOT / "train.py", sys.argv[1:])
    if choice is not None and choice.engine == "unsloth":
        try:
            load_unsloth()  # before anything imports transformers
        except SparktuneError as error:
            print(f"{error} (engine unsloth: {choice.reason})", file=sys.stderr)
            return error.exit_code

    if warmth is not None:
        from sparktune.training.rehearsal import run_rehearsal

        return run_rehearsal(args.config, args.rehearse, warmth)

    from sparktune.training.session import run_session  # torch loads here, after --help and usage errors

    return run_session(flags, args.config, os.environ, choice)


if __name__ == "__main__":
    sys.exit(main())
