"""Stage `mtp`: gives the merged model its MTP head. All logic of the head itself is in mtp/.

    python -m sparktune.setup.export.train_mtp_step --run RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparktune.mtp.extract_upstream_mtp import find_head
from sparktune.mtp.inject_mtp import inject, read_record
from sparktune.setup.export.merge import read_record as read_merge_record
from sparktune.setup.export.stage import Stage, run_stage
from sparktune.setup.plan.errors import PreflightError
from sparktune.setup.plan.exports import check_mtp_mode
from sparktune.setup.plan.models import probe, resolve_model_dir
from sparktune.setup.plan.outfolder import gib

__all__ = ["attach"]


def attach(stage: Stage) -> None:
    """Writes `output/RUN-mtp-default` with the base's own head, or says in one sentence why there is none."""
    plan, run, events = stage.plan, stage.run, stage.events
    check_mtp_mode(plan.mtp)
    if plan.mtp == "skip":
        events.choice("mtp", "skip", "asked for with --mtp skip")
        return
    if not run.merged.is_dir():
        raise PreflightError(f"{run.merged} should hold the merged model; there is none. Run the merge first.")
    spec = probe(str(run.merged))
    if spec.model_type != "qwen3_5_text":
        events.choice("mtp", "skip", f"{plan.model} is a {spec.model_type}, which has no MTP head")
        return
    base_dir = resolve_model_dir(plan.model)
    head = find_head(base_dir)
    if not head:
        events.choice("mtp", "skip", f"{plan.model} has no mtp.* tensors: it was saved without its MTP head")
        return
    record = {"run": run.name, "trained_sha256": read_merge_record(run.merged).get("trained_sha256")}
    out = run.mtp("default")
    found = read_record(out)
    if found and all(found.get(k) == v for k, v in record.items()):
        events.message(f"{out} already holds this model with its MTP head; it is kept.")
        return
    own = inject(run.merged, head, out, source=plan.model, record=record,
                 replace=lambda folder: read_record(folder).get("run") == run.name)
    events.choice("mtp", "default", f"the head of {plan.model}, unchanged, in {out} ({gib(own)} of its own)")
    events.emit("artifact", path=str(out), bytes=own)


def main(argv: list[str] | None = None) -> int:
    """Runs the stage. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparktune.setup.export.train_mtp_step", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder, results/RUN")
    return run_stage("mtp", parser.parse_args(argv).run, attach)


if __name__ == "__main__":
    sys.exit(main())
