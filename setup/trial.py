"""What a trial showed: base against tuned model, gradients, memory, speed, and what the whole run would take."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparktune.setup import strings
from sparktune.setup.estimate import eta_table, run_eta
from sparktune.setup.machine.detect import detect_machine
from sparktune.setup.machine.speedbook import steady_tok_per_s
from sparktune.setup.machine.symptoms import read_metrics
from sparktune.setup.plan.models import probe
from sparktune.setup.plan.recommend import planned_steps
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, Plan
from sparktune.setup.replay import replay_command

__all__ = ["show_trial", "slow_ops", "whole_run"]

_ANSWER = 200


def whole_run(plan: Plan) -> Plan:
    """Returns the plan of the whole run that `plan` tried: with its values, without the trial's end and name."""
    return plan.model_copy(update={"trial": False, "max_steps": None, "save_steps": None, "eval_steps": None,
                                   "name": None})


def slow_ops(plan: Plan) -> list[str]:
    """Returns the ops that a GPU runs by plain PyTorch because no fused kernel could serve them."""
    if plan.device != "cuda":
        return []
    return [op for op, reason in plan.kernels.items() if reason.startswith("reference")]


def _figures(plan: Plan, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    losses = [r["loss"] for r in rows if r.get("loss") is not None]
    norms = [r["grad_norm"] for r in rows if r.get("grad_norm") is not None]
    held_out = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    found = [("training loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}")] if losses else []
    if len(held_out) > 1:
        change = (held_out[-1][1] / held_out[0][1] - 1) * 100
        text = f"base {held_out[0][1]:.4f}, tuned {held_out[-1][1]:.4f} ({change:+.1f} %)"
        found.append(("evaluation loss", text))
    if norms:
        found.append(("gradient norm", f"median {median(norms):.3g}, largest {max(norms):.3g}"))
    peak = max((r["peak_gib"] for r in rows if "peak_gib" in r), default=None)
    if peak is not None:
        found.append(("peak memory", f"{peak:.2f} GiB"))
    speed = steady_tok_per_s(rows)
    if speed is not None:
        found.append(("speed", f"{speed:,.0f} tok/s"))
    return found


def show_trial(plan: Plan, run: RunDir, console: Console) -> None:
    """Prints what a finished trial showed and the command of the whole run."""
    rows = read_metrics(run.metrics)
    table = Table(title=strings.TRIAL_TITLE.format(steps=plan.max_steps, name=run.name), title_justify="left",
                  box=None, pad_edge=False, show_header=False)
    for name, text in _figures(plan, rows):
        table.add_row(name, escape(text))
    for prompt, before, after in _answers(run):
        table.add_row("asked", escape(prompt))
        table.add_row("  base", escape(before))
        table.add_row("  tuned", escape(after))
    console.print(table)
    slow = slow_ops(plan)
    if slow:
        console.print(strings.TRIAL_SLOW.format(ops=", ".join(slow), log=run.log), style="yellow", soft_wrap=True)
    spec = probe(plan.model)
    report = DatasetReport.model_validate_json(run.data_report.read_text(encoding="utf-8"))
    whole = whole_run(plan)
    steps = planned_steps(whole, report)
    whole = whole.model_copy(update={"save_steps": max(1, round(steps / 10)), "eval_steps": max(1, round(steps / 10))})
    eta = run_eta(whole, spec, report, detect_machine(plan.device, plan.output))
    console.print(eta_table(eta, whole, spec, report))
    print(strings.TRIAL_NEXT, replay_command(whole_run(plan)), sep="\n  ")


def _answers(run: RunDir) -> list[tuple[str, str, str]]:
    """(prompt, the base's answer, the tuned model's) of each sample prompt."""
    by_prompt: dict[str, list[str]] = {}
    for row in read_metrics(run.samples):
        by_prompt.setdefault(row["prompt"], []).append(row["answer"])
    return [(p[:_ANSWER], a[0][:_ANSWER], a[-1][:_ANSWER]) for p, a in by_prompt.items() if len(a) > 1]
