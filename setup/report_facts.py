"""Everything the report shows, read from a run's folders; whatever is missing or damaged is left out, and said."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Plan
from sparktune.setup.plan.untrusted import json_object_file, json_rows
from sparktune.setup.runstate import RunState, stages_of

__all__ = ["Artifact", "Facts", "SamplePair", "StageFact", "gather", "merge_gap", "summary_of", "versions"]

_PACKAGES = (
    "sparktune", "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "triton", "unsloth", "trl",
    "bitsandbytes", "flash-linear-attention", "pydantic",
)
_HASH_CHUNK = 8 * 2**20
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file the run made."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SamplePair:
    """One prompt's answers: before, after, and whoever else was asked. Pairs are (who or when, answer)."""

    prompt: str
    before: tuple[str, str] | None
    after: tuple[str, str] | None
    others: list[tuple[str, str]]
    """Of other forms of the result, such as a GGUF."""
    between: list[tuple[str, str]]
    """During training."""


@dataclass(frozen=True, kw_only=True)
class StageFact:
    """How a stage went."""

    name: str
    status: str
    """done, failed, running or waiting."""
    seconds: float | None
    errors: list[str]


@dataclass(kw_only=True)
class Facts:
    """What is known of a run."""

    run: RunDir
    plan: Plan | None = None
    data: DatasetReport | None = None
    steps: Rows = field(default_factory=list)
    evals: Rows = field(default_factory=list)
    samples: list[SamplePair] = field(default_factory=list)
    checks: Rows = field(default_factory=list)
    """Figures of the evaluation stage that are not answers."""
    stages: list[StageFact] = field(default_factory=list)
    choices: Rows = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Parts that should be there and are not, with the reason."""

    @property
    def status(self) -> str:
        """complete, failed or incomplete."""
        states = {s.status for s in self.stages}
        return "failed" if "failed" in states else "complete" if states == {"done"} else "incomplete"

    @property
    def failed_stage(self) -> StageFact | None:
        """The stage that failed, if one did."""
        return next((s for s in self.stages if s.status == "failed"), None)


def gather(run: RunDir, plan: Plan | None, progress: Callable[[int, int], None] | None = None) -> Facts:
    """Reads a run's records and hashes its files. Missing or damaged parts end up in `missing`, never as an error.

    Args:
        run: the run.
        plan: its plan, or None where plan.yaml cannot be read.
        progress: called with (bytes hashed, bytes in all).
    """
    facts = Facts(run=run, plan=plan, versions=versions())
    if plan is None:
        facts.missing.append(f"{run.plan.name}: missing or unreadable")
    facts.data = _data_report(facts)
    for row in _rows(run.metrics, facts.missing):
        (facts.evals if "eval_loss" in row else facts.steps).append(row)
    facts.steps = _last_of_each_step(facts.steps)
    facts.evals = _last_of_each_step(facts.evals)
    _samples(facts, _rows(run.samples, facts.missing))
    _stages(facts)
    facts.artifacts = _artifacts(run, plan, progress)
    return facts


def versions() -> dict[str, str]:
    """Returns the versions of Python, the system and the packages that matter, where installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def merge_gap(run: RunDir) -> dict[str, Any] | None:
    """Returns what training measured of a quantised base against the merged model; None where none was quantised."""
    try:
        found = json_object_file(run.merge_gap)
    except (OSError, ValueError):
        return None
    figures = all(type(found.get(name)) in (int, float) for name in ("kl_mean", "kl_max"))
    return found if figures and isinstance(found.get("base"), str) else None


def summary_of(facts: Facts, replay: str) -> dict[str, Any]:
    """Returns summary.json: status, paths, figures, versions, hashes."""
    run, plan, data = facts.run, facts.plan, facts.data
    failed = facts.failed_stage
    paths = {
        "run": run.root, "plan": run.plan, "report": run.report, "metrics": run.metrics, "samples": run.samples,
        "adapter": run.adapter, "weights": run.weights, "merged": run.merged, "gguf": run.gguf,
    }
    served = run.served_mtp(plan.mtp) if plan else None
    if served is not None:
        paths["mtp"] = served
    return {
        "schema_version": 1,
        "run": run.name,
        "status": facts.status,
        "failed_stage": failed.name if failed else None,
        "errors": failed.errors if failed else [],
        "model": plan.model if plan else None,
        "mode": plan.mode if plan else None,
        # The page itself is written after this file; it counts as there.
        "paths": {name: str(path.resolve()) for name, path in paths.items() if path.exists() or name == "report"},
        "figures": _figures(facts),
        "data": {
            "path": data.path, "sha256": data.sha256, "rows": data.rows, "train_examples": data.train_examples,
            "eval_examples": data.eval_examples, "dropped": data.dropped, "cache_key": data.cache_key,
        } if data else None,
        "stages_s": {s.name: s.seconds for s in facts.stages if s.seconds is not None},
        "kernels": plan.kernels if plan else {},
        "evaluation": _plain(facts.checks),
        "quantised_base": merge_gap(run),
        "versions": facts.versions,
        "artifacts": [
            {"path": str(a.path.resolve()), "bytes": a.bytes, "sha256": a.sha256} for a in facts.artifacts
        ],
        "missing": facts.missing,
        "warnings": facts.warnings,
        "replay": replay,
    }


def _figures(facts: Facts) -> dict[str, Any]:
    losses = [r["loss"] for r in facts.steps if _is_number(r.get("loss"))]
    speeds = sorted(r["tok_per_s"] for r in facts.steps if _is_number(r.get("tok_per_s")))
    peaks = [r["peak_gib"] for r in facts.steps if _is_number(r.get("peak_gib"))]
    evals = [r["eval_loss"] for r in facts.evals if _is_number(r.get("eval_loss"))]
    return {
        "steps": facts.steps[-1].get("step") if facts.steps else 0,
        "tokens": _sum(facts.steps, "tokens"),
        "supervised_tokens": _sum(facts.steps, "supervised_tokens"),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "first_eval_loss": evals[0] if evals else None,
        "best_eval_loss": min(evals) if evals else None,
        "last_eval_loss": evals[-1] if evals else None,
        "median_tok_per_s": speeds[len(speeds) // 2] if speeds else None,
        "peak_gib": max(peaks) if peaks else None,
        "seconds": round(sum(s.seconds or 0.0 for s in facts.stages), 3),
    }


def _sum(rows: Rows, key: str) -> int:
    return sum(r[key] for r in rows if _is_number(r.get(key)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Returns a JSON value with null for what JSON cannot hold (NaN, infinity)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _rows(path: Path, missing: list[str]) -> Rows:
    """Reads NDJSON; a damaged line (a run killed while writing) is left out and said."""
    if not path.is_file():
        missing.append(f"{path.name}: not there")
        return []
    rows, damaged = json_rows(path)
    if damaged:
        missing.append(f"{path.name}: {damaged} unreadable line{'s' if damaged > 1 else ''} left out")
    return rows


def _last_of_each_step(rows: Rows) -> Rows:
    """A resumed run may have logged a step twice: the last one counts."""
    by_step = {row["step"]: row for row in rows if _is_number(row.get("step"))}
    return [by_step[step] for step in sorted(by_step)]


def _data_report(facts: Facts) -> DatasetReport | None:
    path = facts.run.data_report
    try:
        return DatasetReport.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError:
        facts.missing.append(f"data/{path.name}: not there")
    except ValueError:
        facts.missing.append(f"data/{path.name}: unreadable")
    return None


def _samples(facts: Facts, rows: Rows) -> None:
    """Groups answers by prompt; rows without an answer are evaluation figures.

    The evaluation stage's rows say `stage` (before, after) and `source` (base, merged, gguf TYPE), training's `step`.
    Where a prompt was not evaluated, its first and last answer in training stand in.
    """
    asked: dict[str, Rows] = {}
    for row in rows:
        if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
            asked.setdefault(row["prompt"], []).append(row)
        else:
            facts.checks.append(row)
    for prompt, given in asked.items():
        training = [(f"step {r.get('step')}", r["answer"]) for r in given if r.get("stage") is None]
        before = [(str(r.get("source", "base")), r["answer"]) for r in given if r.get("stage") == "before"]
        after = [(str(r.get("source", "result")), r["answer"]) for r in given if r.get("stage") == "after"]
        if not before and training and training[0][0] == "step 0":
            before = [training.pop(0)]
        if not after and training:
            after = [training.pop()]
        facts.samples.append(SamplePair(
            prompt=prompt, before=before[0] if before else None, after=after[0] if after else None,
            others=after[1:], between=training,
        ))


def _stages(facts: Facts) -> None:
    """Tells each stage's outcome from its events; state.json adds the times of those that ended well."""
    run, plan = facts.run, facts.plan
    seconds: dict[str, float] = {}
    if run.state.is_file():
        try:
            seconds = {name: float(entry["seconds"]) for name, entry in RunState(run).stages.items()}
        except UsageError:
            facts.missing.append(f"{run.state.name}: unreadable")
    names = stages_of(plan) if plan else tuple(seconds)
    choices: dict[tuple[str, str], dict[str, Any]] = {}
    for name in names:
        path = run.stage_events(name)
        events = _rows(path, facts.missing) if path.is_file() else []
        # A stage that ran again after a failure appends: what counts is its last run.
        starts = [i for i, e in enumerate(events) if e.get("kind") == "start"]
        last = events[starts[-1] :] if starts else events
        end = next((e for e in reversed(last) if e.get("kind") == "end"), None)
        errors, warnings = ([str(e.get("text", "")) for e in last if e.get("kind") == "message" and
                             e.get("level") == level] for level in ("error", "warning"))
        facts.warnings += [text for text in warnings if text not in facts.warnings]
        for event in last:
            if event.get("kind") == "choice":
                choices[str(event.get("what")), str(event.get("chosen"))] = event
        if name == "report":
            status = "done"  # it is being written, and read only once it is
        elif end is not None:
            status = "done" if end.get("ok") else "failed"
        else:
            status = "done" if name in seconds else "running" if last else "waiting"
        took = seconds.get(name, end.get("seconds") if end else None)
        facts.stages.append(StageFact(name=name, status=status, seconds=took, errors=errors))
    facts.choices = list(choices.values())
    if any(s.status == "failed" for s in facts.stages):
        return
    # A stage that began and never ended, with nothing after it, was killed.
    facts.stages = [
        StageFact(name=s.name, status="failed", seconds=s.seconds, errors=["It began and never ended: killed?"])
        if s.status == "running" else s
        for s in facts.stages
    ]


def _artifacts(run: RunDir, plan: Plan | None, progress: Callable[[int, int], None] | None) -> list[Artifact]:
    folders = [run.adapter, run.weights, run.merged, run.gguf]
    folders += [run.mtp(mode) for mode in ("trained", "default")]
    files = sorted(p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.is_file())
    total, done = sum(p.stat().st_size for p in files), 0
    known: dict[tuple[int, int], str] = {}
    found = []
    for path in files:
        stat = path.stat()
        # Folders with an MTP head share unchanged shards with the merged one by hard link: hashed once.
        key = (stat.st_dev, stat.st_ino)
        if key not in known:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_HASH_CHUNK):
                    digest.update(chunk)
                    if progress:
                        progress(done + file.tell(), total)
            known[key] = digest.hexdigest()
        done += stat.st_size
        found.append(Artifact(path=path, bytes=stat.st_size, sha256=known[key]))
    return found

