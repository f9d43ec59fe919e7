"""Stage `mtp`: gives the merged model its MTP head, the base's own or a trained one. All logic of the head is in mtp/.

    python -m sparktune.setup.export.train_mtp_step --run RUN
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparktune.mtp.extract_upstream_mtp import extract, find_head, text_config
from sparktune.mtp.inject_mtp import inject, read_record
from sparktune.mtp.tensors import Place, check_head
from sparktune.setup.export.merge import read_record as read_merge_record
from sparktune.setup.export.stage import Stage, run_stage
from sparktune.setup.plan.errors import PreflightError, UsageError
from sparktune.setup.plan.models import CATALOGUE, probe, resolve_model_dir
from sparktune.setup.plan.outfolder import gib
from sparktune.setup.plan.schema import ModelSpec
from sparktune.setup.plan.weights import safetensors_header

__all__ = ["attach"]


def _upstream(spec: ModelSpec) -> str | None:
    """Returns the published model of this shape, where there is one."""
    shape = (spec.hidden_size, spec.num_layers, spec.intermediate_size)
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size")
    texts = {name: text_config(config) for name, config in CATALOGUE.items()}
    return next((name for name, text in texts.items() if tuple(text[k] for k in keys) == shape), None)


def _given_head(stage: Stage, given: str, spec: ModelSpec) -> Mapping[str, Place]:
    """Returns the head that --mtp-head names: a file, a folder, or a hub id whose head is fetched once."""
    path = Path(given).expanduser()
    if path.is_file():
        return {n: (path, e) for n, e in safetensors_header(path).items()}
    if path.is_dir():
        _same_vocabulary(stage, given, path, spec)
        return find_head(path)
    out = stage.run.mtp_work / "start.safetensors"
    if not out.is_file():
        size = extract(given, out, stage.events.message)
        stage.events.message(f"Fetched the MTP head of {given} ({gib(size)}).")
    return {n: (out, e) for n, e in safetensors_header(out).items()}


def _same_vocabulary(stage: Stage, given: str, folder: Path, spec: ModelSpec) -> None:
    """A head reads tokens through the model's embeddings: another vocabulary means it learned about other tokens."""
    try:
        theirs = text_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))).get("vocab_size")
    except (OSError, ValueError):
        return
    if theirs in (None, spec.vocab_size):
        return
    text = f"--mtp-head {given} belongs to a vocabulary of {theirs:,} tokens; this model's has {spec.vocab_size:,}. "
    if stage.plan.mtp == "default":
        raise UsageError(text + "It would draft badly: use --mtp trained, or the head of this model's own base.")
    stage.events.message(text + "It is the start of the training all the same.", "warning")


def _starting_head(stage: Stage, spec: ModelSpec) -> tuple[Mapping[str, Place], str]:
    """Returns the head to start from and what messages call its source; an empty one where there is none."""
    plan, events = stage.plan, stage.events
    base_dir = resolve_model_dir(plan.model)
    head = {} if plan.mtp_head else find_head(base_dir)
    if head:
        return head, plan.model
    if plan.mtp_head:
        head = dict(_given_head(stage, plan.mtp_head, spec))
        if not head:
            raise UsageError(f"--mtp-head {plan.mtp_head} holds no mtp.* tensors. Give the published checkpoint, or a "
                             "file made by mtp/extract_upstream_mtp.py.")
        return head, plan.mtp_head
    upstream = _upstream(spec)
    offer = (f"Its shape is {upstream}'s: resume with --mtp-head {upstream} to fetch that head" if upstream else
             "Resume with --mtp-head and the published checkpoint it was made from")
    events.choice("mtp", "skip", f"{plan.model} has no mtp.* tensors: it was saved without its MTP head. {offer}")
    return {}, ""


def _refuse_quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    if found:
        kind = found.get("quant_method", "quantised") if isinstance(found, dict) else "quantised"
        raise UsageError(f"{folder} is quantised ({kind}); an MTP head is trained against the unquantised model. Use "
                         "the unquantised base, or --mtp default.")


def _train(stage: Stage, head: Mapping[str, Place], source: str) -> tuple[str, Mapping[str, Place], str]:
    """Trains and measures. Returns (trained or default, the head to ship, why)."""
    import torch

    from sparktune.mtp.choose import stopping, train_and_choose
    from sparktune.mtp.train_mtp import HeadRun
    from sparktune.setup.data.tokenise import prepare
    from sparktune.setup.data.tokenizer import load_tokenizer

    plan, run, events = stage.plan, stage.run, stage.events
    if plan.data is None:
        raise UsageError("--mtp trained needs the run's data, and plan.yaml names none. Use --mtp default.")
    base_dir = resolve_model_dir(plan.model)
    tokenizer = load_tokenizer(str(base_dir))
    data = prepare(plan, probe(plan.model), str(base_dir), events, tokenizer)
    job = HeadRun(
        model_dir=run.merged, head=head, source=source, out=run.mtp_work / "head.safetensors", work=run.mtp_work,
        num_epochs=plan.mtp_epochs, learning_rate=plan.mtp_learning_rate, seed=plan.seed,
    )
    cuda = plan.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    with stopping(device, run.name) as stop:
        found = train_and_choose(job, data.train, data.evaluation, tokenizer, device, events, stop)
    return found.chosen, found.head, found.reason


def _remove_own(stage: Stage, folder: Path) -> None:
    """Removes an earlier head folder of this run that no longer is its result."""
    if folder.is_dir() and read_record(folder).get("run") == stage.run.name:
        shutil.rmtree(folder)


def attach(stage: Stage) -> None:
    """Writes `output/RUN-mtp` or `output/RUN-mtp-default`, or says in one sentence why there is neither.

    With --mtp trained the folder of the head that drafted better on held-out prompts is written.
    """
    plan, run, events = stage.plan, stage.run, stage.events
    if plan.mtp == "skip":
        events.choice("mtp", "skip", "asked for with --mtp skip")
        return
    if not run.merged.is_dir():
        raise PreflightError(f"{run.merged} should hold the merged model; there is none. Run the merge first.")
    spec = probe(str(run.merged))
    if spec.model_type != "qwen3_5_text":
        events.choice("mtp", "skip", f"{plan.model} is a {spec.model_type}, which has no MTP head")
        return
    head, source = _starting_head(stage, spec)
    if not head:
        return
    config = json.loads((run.merged / "config.json").read_text(encoding="utf-8"))
    check_head(head, text_config(config), source)
    record: dict[str, Any] = {
        "run": run.name, "trained_sha256": read_merge_record(run.merged).get("trained_sha256"), "mtp": plan.mtp,
        "mtp_head": plan.mtp_head,
    }
    if plan.mtp == "trained":
        record |= {"mtp_epochs": plan.mtp_epochs, "mtp_learning_rate": plan.mtp_learning_rate, "seed": plan.seed}
    served = run.served_mtp(plan.mtp)
    found = read_record(served) if served else {}
    if found and all(found.get(k) == v for k, v in record.items()):
        events.message(f"{served} already holds this model with its MTP head; it is kept.")
        return
    chosen, why = "default", f"the head of {source}, unchanged"
    if plan.mtp == "trained":
        _refuse_quantised(run.merged)
        chosen, head, why = _train(stage, head, source)
        _remove_own(stage, run.mtp("trained"))
    out = run.mtp(chosen)
    own = inject(run.merged, head, out, source=source, record={**record, "chosen": chosen},
                 replace=lambda folder: read_record(folder).get("run") == run.name)
    events.choice("mtp", chosen, f"{why}, in {out} ({gib(own)} of its own)")
    events.emit("artifact", path=str(out), bytes=own)


def main(argv: list[str] | None = None) -> int:
    """Runs the stage. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.export.train_mtp_step", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, results/RUN")
    return run_stage("mtp", parser.parse_args(argv).run, attach)


if __name__ == "__main__":
    sys.exit(main())
