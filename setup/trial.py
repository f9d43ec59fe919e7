"""What a trial showed: base against tuned model, gradients, memory, speed, and what the whole run would take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape

from sparktune.setup import strings
from sparktune.setup.cards import first_and_last_loss, table
from sparktune.setup.estimate import eta_table, run_eta
from sparktune.setup.machine.detect import detect_machine
from sparktune.setup.machine.diagnose import Finding
from sparktune.setup.machine.speedbook import steady_tok_per_s
from sparktune.setup.machine.symptoms import diagnose_source, reference_ops
from sparktune.setup.plan.arithmetic import training_flop
from sparktune.setup.plan.eta import filled_share
from sparktune.setup.plan.memory import longest_row_tokens, predict_peak
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec, Plan
from sparktune.setup.plan.speeds import rate_for
from sparktune.setup.plan.untrusted import json_rows
from sparktune.setup.replay import replay_command

__all__ = ["show_trial", "slowness", "whole_run"]

_ANSWER = 200
_MORE_MEMORY = 1.25
"""Of the predicted peak: kernels that keep less are part of the prediction, which is otherwise within 7 %."""


def whole_run(plan: Plan) -> Plan:
    """Returns the plan of the whole run that `plan` tried: with its values, without the trial's end and name."""
    return plan.model_copy(update={"trial": False, "max_steps": None, "save_steps": None, "eval_steps": None,
                                   "name": None})


def slowness(
    plan: Plan, spec: ModelSpec, report: DatasetReport, machine: Machine, rows: Sequence[dict[str, Any]],
    findings: Sequence[Finding] = (),
) -> list[str]:
    """Returns why the fast kernels seem not to be in use; nothing on a CPU, which has none.

    Args:
        plan: as it was trained, with the implementation of every op.
        spec: the model.
        report: the data.
        machine: where it was trained.
        rows: of metrics.jsonl.
        findings: what the run's log is known for.
    """
    if plan.device != "cuda":
        return []
    why = []
    if slow := reference_ops(plan):
        why.append(strings.SLOW_OPS.format(ops=", ".join(slow)))
    why += [strings.SLOW_LOG.format(line=f.line[:_ANSWER]) for f in findings if f.name == "slow-path"]
    speed, rate = steady_tok_per_s(rows), rate_for(plan, spec, machine)
    if speed is not None and rate is not None:
        flop = training_flop(plan, spec, document=report.lengths.mean, supervised_share=report.supervised_share)
        least = rate.flop_per_s * rate.low / flop * filled_share(plan, report)
        if speed < least:
            why.append(strings.SLOW_SPEED.format(speed=speed, least=least, source=rate.reason))
    peak = max((row["peak_gib"] for row in rows if row.get("peak_gib")), default=0.0)
    tokens, longest = longest_row_tokens(plan, report), min(report.lengths.max, plan.max_seq_length)
    predicted = predict_peak(plan, spec, machine, tokens=tokens, longest=longest).allocator_gib
    if peak > predicted * _MORE_MEMORY:
        why.append(strings.SLOW_PEAK.format(peak=peak, predicted=predicted))
    return why


def _figures(plan: Plan, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    losses = first_and_last_loss(rows)
    norms = [r["grad_norm"] for r in rows if r.get("grad_norm") is not None]
    held_out = [r["eval_loss"] for r in rows if r.get("eval_loss") is not None]
    found = [("training loss", f"{losses[0]:.4f} -> {losses[1]:.4f}")] if losses else []
    if len(held_out) > 1:
        change = (held_out[-1] / held_out[0] - 1) * 100 if held_out[0] else 0.0
        text = f"base {held_out[0]:.4f}, tuned {held_out[-1]:.4f} ({change:+.1f} %)"
        found.append(("evaluation loss", text))
    if norms:
        found.append(("gradient norm", f"median {median(norms):.3g}, largest {max(norms):.3g}"))
    peak = max((r["peak_gib"] for r in rows if r.get("peak_gib") is not None), default=None)
    if peak is not None:
        found.append(("peak memory", f"{peak:.2f} GiB"))
    speed = steady_tok_per_s(rows)
    if speed is not None:
        found.append(("speed", f"{speed:,.0f} tok/s"))
    return found


def show_trial(plan: Plan, run: RunDir, console: Console) -> None:
    """Prints what a finished trial showed and the command of the whole run."""
    rows, damaged = json_rows(run.metrics)
    asked, unread = _answers(run)
    card = table(strings.TRIAL_TITLE.format(steps=plan.max_steps, name=run.name))
    for name, text in _figures(plan, rows):
        card.add_row(name, escape(text))
    for prompt, before, after in asked:
        card.add_row("asked", escape(prompt))
        card.add_row("  base", escape(before))
        card.add_row("  tuned", escape(after))
    console.print(card)
    for path, count, good in ((run.metrics, damaged, len(rows)), unread):
        if count:
            text = strings.TRIAL_DAMAGED.format(count=count, rows=count + good, path=path)
            console.print(text, style="yellow", soft_wrap=True, markup=False)
    spec, machine = probe(plan.model), detect_machine(plan.device, plan.output)
    report = DatasetReport.model_validate_json(run.data_report.read_text(encoding="utf-8"))
    why = slowness(plan, spec, report, machine, rows, diagnose_source(str(run.root), plan.results))
    if why:
        text = strings.TRIAL_SLOW.format(why=" ".join(why), log=run.log)
        console.print(text, style="yellow", soft_wrap=True, markup=False)
    whole = whole_run(plan)
    eta = run_eta(whole, spec, report, machine)
    console.print(eta_table(eta, whole, spec, report))
    print(strings.TRIAL_NEXT, replay_command(whole_run(plan)), sep="\n  ")


def _answers(run: RunDir) -> tuple[list[tuple[str, str, str]], tuple[Path, int, int]]:
    """([(prompt, the base's answer, the tuned model's)], (their file, its damaged rows, its good ones))."""
    by_prompt: dict[str, list[str]] = {}
    rows, damaged = json_rows(run.samples)
    said = [(row.get("prompt"), row.get("answer")) for row in rows]
    good = [(prompt, answer) for prompt, answer in said if isinstance(prompt, str) and isinstance(answer, str)]
    for prompt, answer in good:
        by_prompt.setdefault(prompt, []).append(answer)
    asked = [(p[:_ANSWER], a[0][:_ANSWER], a[-1][:_ANSWER]) for p, a in by_prompt.items() if len(a) > 1]
    return asked, (run.samples, damaged + len(rows) - len(good), len(good))
