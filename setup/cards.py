"""Tables for people: the preflight, the data, the plan with its reasons, the result."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparktune.setup import strings
from sparktune.setup.export.handover import result_lines
from sparktune.setup.histogram import Histogram
from sparktune.setup.machine.check import Check
from sparktune.setup.machine.diagnose import Finding
from sparktune.setup.machine.symptoms import read_metrics
from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.outfolder import size_of
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Cleaned, DatasetReport, Plan, Recommendation
from sparktune.setup.plan.untrusted import shell_word

if TYPE_CHECKING:
    from sparktune.setup.outlook import Outlook  # stands on the pipeline, which shows these cards

__all__ = [
    "checks_table", "findings_table", "first_and_last_loss", "flaws", "next_steps", "outlook_table", "plan_pages",
    "plan_table", "report_tables", "result_table", "table",
]

_ALWAYS = (
    "model", "data", "mode", "engine", "num_epochs", "eval_split", "max_seq_length", "recompute", "mtp", "gguf",
    "backend",
)
_SELDOM = ("results", "output", "backend", "device", "dtype", "save_steps", "eval_steps")
"""Values that seldom matter stand first in a table that scrolls: its end is what is seen."""
_NARROW = 130
_STATUS = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def table(title: str, *columns: str) -> Table:
    """Returns an empty table as every card draws it; without columns it has no heading."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(columns))
    for name in columns:
        made.add_column(name, overflow="fold")
    return made


def checks_table(checks: Sequence[Check]) -> Table:
    """Shows the preflight."""
    made = table(strings.CHECKS_TITLE, "check", "", "seen", "what to do")
    for check in checks:
        made.add_row(check.name, Text(check.status, _STATUS[check.status]), escape(check.seen), escape(check.fix))
    return made


def findings_table(findings: Sequence[Finding]) -> Table:
    """Shows known failures: the line that met them, the cause, what to do."""
    made = table(strings.FINDINGS_TITLE, "failure", "seen", "cause and what to do")
    for finding in findings:
        style = "yellow" if finding.warning else "bold red"
        made.add_row(Text(finding.name, style), Text(finding.line[:300]), escape(finding.sentence()))
    return made


def report_tables(report: DatasetReport, bars: bool = True) -> RenderableType:
    """Shows what the data is: rows, drops, lengths, packing.

    Args:
        report: the data.
        bars: also draw how long the examples are.
    """
    facts = table(strings.DATA_TITLE, "", "")
    facts.show_header = False
    lengths = report.lengths
    fills = ", ".join(f"{n}: {share:.0%} real tokens" for n, share in report.packing.items())
    rows: list[tuple[str, str]] = [
        ("file", f"{report.path} ({report.bytes / 2**20:.1f} MiB)"),
        ("rows", f"{report.rows:,}: {', '.join(f'{n:,} {kind}' for kind, n in report.formats.items())}"),
        ("used", f"{report.kept:,}: {report.train_examples:,} to train, {report.eval_examples:,} to evaluate"),
        ("left out", ", ".join(f"{n:,} {code}" for code, n in report.dropped.items()) or strings.NOTHING),
        ("tokens", f"{lengths.total:,} in training, {report.supervised_tokens:,} learned "
                   f"({report.supervised_share:.0%})"),
        ("length", f"mean {lengths.mean:.0f}, median {lengths.p50}, 90 % up to {lengths.p90}, "
                   f"99 % up to {lengths.p99}, longest {lengths.max}"),
        ("kinds", f"{report.multi_turn:,} multi-turn, {report.with_system:,} with a system prompt, "
                  f"{report.with_thinking:,} with thinking"),
        ("repeats", f"{report.duplicates:,} exact duplicates, {report.near_duplicates:,} near ones; of the held-out "
                    f"rows {report.eval_leaks:,} are also in training, {report.near_leaks:,} nearly"),
        ("personal data", _personal(report) or strings.NOTHING),
        ("packing", fills or strings.NOTHING),
    ]
    for name, text in rows:
        facts.add_row(name, escape(text))
    for cleaned in (report.cleaned, report.eval_cleaned):
        if cleaned is not None:
            facts.add_row("cleaned", escape(_cleaned(cleaned)))
    parts: list[RenderableType] = [facts]
    if bars:
        drawn = Histogram(lengths.histogram_edges, lengths.histogram_counts, "tokens")
        parts += [Text("Lengths of training examples", "dim"), drawn]
    for problem in report.problems:
        parts.append(Text(f"line {problem.line}: {problem.code}: {problem.text}", "yellow"))
    parts += [Text(text, "yellow") for text in report.warnings]
    return Group(*parts)


def flaws(report: DatasetReport) -> dict[str, str]:
    """Returns what the data has that a cleaned copy would not have, by the field that makes one; empty: nothing."""
    repeats = (report.duplicates, report.near_duplicates, report.eval_leaks + report.near_leaks)
    personal = _personal(report)
    return {
        "dedupe": strings.FOUND_REPEATS.format(exact=repeats[0], near=repeats[1], held_out=repeats[2])
        if any(repeats) else "",
        "redact_pii": strings.FOUND_PERSONAL.format(kinds=personal) if personal else "",
    }


def _personal(report: DatasetReport) -> str:
    """Returns how many rows hold personal data, by kind; empty where none does."""
    rows: dict[str, int] = {}
    for code, found in (*report.findings.items(), *report.eval_findings.items()):
        if code.startswith("pii_"):
            kind = code.removeprefix("pii_")
            rows[kind] = rows.get(kind, 0) + found.rows
    return ", ".join(f"{kind} in {count:,} rows" for kind, count in rows.items())


def _cleaned(cleaned: Cleaned) -> str:
    """Returns what was done to a file, and where the copy is."""
    removed = ", ".join(f"{found.rows:,} {code}" for code, found in cleaned.removed.items()) or strings.NOTHING
    places = ", ".join(f"{found.count:,} {kind}" for kind, found in cleaned.redacted.items()) or strings.NOTHING
    return f"{cleaned.path}; left out: {removed}; replaced: {places}. {cleaned.original} is as it was."


def show_value(value: Any) -> str:
    """Returns a plan's value as a person would write it."""
    if value is None or value == []:
        return strings.NOTHING
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    if isinstance(value, float):
        return f"{value:g}"
    return os.fspath(value) if isinstance(value, Path) else str(value)


def plan_table(plan: Plan, recommendations: Sequence[Recommendation], width: int) -> Table:
    """Shows the values that matter, where each came from, and why recommended ones are what they are.

    Args:
        plan: the complete plan.
        recommendations: the reasons.
        width: columns of the screen; on a narrow one a reason stands under its value.
    """
    shown = _shown(plan)
    return _plan_part(plan, recommendations, width, sorted(shown, key=lambda field: field not in _SELDOM), "")


def plan_pages(plan: Plan, recommendations: Sequence[Recommendation], width: int, height: int) -> list[Table]:
    """Returns the same table in as many parts as a screen of `height` rows needs, seldom values last.

    A value whose reason alone is higher than the screen has a part of its own.
    """
    console = Console(file=io.StringIO(), width=width)
    parts: list[list[str]] = [[]]
    for field in sorted(_shown(plan), key=lambda field: field in _SELDOM):
        longer = _plan_part(plan, recommendations, width, [*parts[-1], field], strings.PART)
        if parts[-1] and len(console.render_lines(longer)) > height:
            parts.append([])
        parts[-1].append(field)
    count = len(parts)
    names = [strings.PART.format(number=n, count=count) for n in range(1, count + 1)] if count > 1 else [""]
    return [
        _plan_part(plan, recommendations, width, fields, name) for fields, name in zip(parts, names, strict=True)
    ]


def _shown(plan: Plan) -> list[str]:
    return [f for f in Plan.model_fields if f in _ALWAYS or (f in plan.origins and plan.origins[f] != "default")]


def _plan_part(
    plan: Plan, recommendations: Sequence[Recommendation], width: int, fields: Sequence[str], part: str
) -> Table:
    narrow = width < _NARROW
    made = table(strings.PLAN_TITLE + part, *(("flag", "value") if narrow else ("flag", "value", "from", "why")))
    made.columns[0].no_wrap = True
    made.columns[0].min_width = max(len(flag_of(field)) for field in _shown(plan))
    reasons = {r.field: f"{r.reason} [{r.source}]" for r in recommendations}
    for field in fields:
        value, reason = show_value(getattr(plan, field)), reasons.get(field, "")
        said = strings.ORIGINS[plan.origins.get(field, "default")]
        if narrow:
            why = f"\n{reason}" if reason else ""
            made.add_row(flag_of(field), Text.assemble(f"{value}  ({said})", (why, "dim")))
        else:
            made.add_row(flag_of(field), escape(value), said, escape(reason))
    return made


def outlook_table(found: Outlook) -> Table:
    """Shows what a plan would take and what stands against it."""
    made = table("", "", "")
    made.title, made.show_header = None, False
    for what, sentence in found.lines:
        made.add_row(Text(what, "dim"), escape(sentence))
    for sentence in found.refusals:
        made.add_row(Text(strings.BLOCKED, "bold red"), escape(sentence))
    return made


def _size(path: Path) -> str:
    count = size_of(path)
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 2**10:.1f} KiB"


def first_and_last_loss(rows: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """Returns the training loss of the first and the last of a run's metrics, or None before the first step."""
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), int | float)]
    return (losses[0], losses[-1]) if losses else None


def next_steps(plan: Plan, run: RunDir) -> list[str]:
    """Returns the commands that make sense after a finished run."""
    return [
        f"read the report  xdg-open {shell_word(str(run.report))}",
        f"talk to it       {strings.run_command('chat', run)}",
        *result_lines(plan, run),
    ]


def result_table(plan: Plan, run: RunDir) -> Table:
    """Shows what a finished run left: figures, and files with their sizes."""
    made = table(strings.RESULT_TITLE.format(name=run.name), "", "")
    made.show_header = False
    losses = first_and_last_loss(read_metrics(run.metrics))
    if losses:
        made.add_row("training loss", f"{losses[0]:.4f} -> {losses[1]:.4f}")
    files = [
        ("adapter", run.adapter), ("weights", run.weights), ("merged model", run.merged),
        ("with MTP head", run.served_mtp(plan.mtp) or run.mtp(plan.mtp)),
        *(("GGUF", p) for p in sorted(run.gguf.glob("*.gguf"))), ("report", run.report), ("summary", run.summary),
    ]
    for what, path in files:
        if path.exists():
            made.add_row(what, escape(f"{path} ({_size(path)})"))
    for line in head_lines(run) if plan.mtp == "trained" else []:
        made.add_row("drafts", escape(line))
    return made


def head_lines(run: RunDir) -> list[str]:
    """Returns what was measured of the trained and the base's own MTP head, none where nothing was."""
    try:
        lines = json.loads((run.mtp_work / "acceptance.json").read_text(encoding="utf-8"))["lines"]
    except (OSError, ValueError, KeyError):
        return []
    return [str(line) for line in lines]
