"""The report as one page: no script, no network, light and dark, readable on a phone. Jinja2 escapes every value."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sparktune.setup.plan.flags import flag_of
from sparktune.setup.plan.schema import Plan
from sparktune.setup.report_facts import Facts, merge_gap
from sparktune.setup.report_style import PAGE
from sparktune.setup.report_svg import Drawing, Mark, Series, histogram, line_chart

__all__ = ["render"]

_BLUE, _ORANGE, _GREEN, _VIOLET = "var(--accent)", "var(--warn)", "var(--good)", "var(--violet)"


def render(facts: Facts, replay: str) -> str:
    """Returns the page.

    Args:
        facts: the run.
        replay: the command that makes the run again, or "".
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=_size, duration=_duration, short=_short, count=lambda n: f"{n:,}")
    return environment.from_string(PAGE).render(
        facts=facts, replay=replay, written=time.strftime("%Y-%m-%d %H:%M"), tiles=_tiles(facts),
        charts=_training_charts(facts), lengths=_length_chart(facts), far_cut=_cut_is_far(facts),
        packing=_packing(facts), choices=_choices(facts),
        folders=_folders(facts), titles=_STAGE_TITLES,
    )


_STAGE_TITLES = {
    "prepare": "Read and tokenise", "train": "Train", "merge": "Merge", "mtp": "MTP head", "gguf": "GGUF",
    "evaluate": "Evaluate", "report": "Report",
}


def _size(count: int) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count} B"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _series(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """Returns (name, figure, note) of what one wants to know first."""
    tiles: list[tuple[str, str, str]] = []
    losses, evals = _series(facts.steps, "loss"), _series(facts.evals, "eval_loss")
    if losses:
        tiles.append(("Training loss", f"{losses[-1][1]:.3f}", f"from {losses[0][1]:.3f}"))
    if evals:
        best = min(y for _, y in evals)
        tiles.append(("Evaluation loss", f"{evals[-1][1]:.3f}", f"best {best:.3f}, from {evals[0][1]:.3f}"))
    if facts.steps:
        tokens = sum(r.get("tokens", 0) for r in facts.steps)
        tiles.append(("Steps", f"{facts.steps[-1]['step']:,}", f"{tokens:,} tokens"))
    speeds = sorted(y for _, y in _series(facts.steps, "tok_per_s"))
    if speeds:
        tiles.append(("Throughput", f"{speeds[len(speeds) // 2]:,.0f}", "tokens a second, median"))
    peaks = [y for _, y in _series(facts.steps, "peak_gib")]
    if peaks:
        tiles.append(("Peak memory", f"{max(peaks):.2f} GiB", "of the training process"))
    gap = merge_gap(facts.run)
    if gap:
        tiles.append(("Merged against trained", f"KL {_short(gap['kl_mean'])}",
                      f"at most {_short(gap['kl_max'])}; trained over {gap['base']}, merged into the original weights"))
    seconds = sum(s.seconds or 0.0 for s in facts.stages)
    if seconds:
        tiles.append(("Time", _duration(seconds), "all stages"))
    return tiles


def _training_charts(facts: Facts) -> list[tuple[str, Drawing]]:
    steps, evals = facts.steps, facts.evals
    drawn = [
        ("Loss", line_chart(
            [Series(name="training", points=_series(steps, "loss"), smooth=True),
             Series(name="evaluation", points=_series(evals, "eval_loss"), colour=_ORANGE, dots=True)],
            title="Loss over steps", x_label="step", y_label="cross-entropy", from_zero=_falls_far(steps))),
        ("Learning rate", line_chart(
            [Series(name="learning rate", points=_series(steps, "lr"), colour=_VIOLET)],
            title="Learning rate over steps", x_label="step", y_label="rate", from_zero=True)),
        ("Throughput", line_chart(
            [Series(name="throughput", points=_series(steps, "tok_per_s"), colour=_GREEN, smooth=True)],
            title="Throughput over steps", x_label="step", y_label="tokens / s", from_zero=True)),
        ("Peak memory", line_chart(
            [Series(name="peak memory", points=_series(steps, "peak_gib"), colour=_ORANGE)],
            title="Peak memory over steps", x_label="step", y_label="GiB", from_zero=True)),
        ("Gradient norm", line_chart(
            [Series(name="gradient norm", points=_series(steps, "grad_norm"), smooth=True)],
            title="Gradient norm over steps", x_label="step", y_label="before clipping", from_zero=True)),
    ]
    return [(name, svg) for name, svg in drawn if svg]


def _falls_far(steps: list[dict[str, Any]]) -> bool:
    """Whether the loss ends below half of its highest value; a flatter curve is shown closer up."""
    losses = [y for _, y in _series(steps, "loss")]
    return not losses or min(losses) < 0.5 * max(losses)


def _length_chart(facts: Facts) -> Drawing:
    if facts.data is None:
        return Drawing("")
    lengths = facts.data.lengths
    marks = []
    plan = facts.plan
    if plan:
        if plan.pack and plan.pack_length:
            marks.append(Mark(x=plan.pack_length, label=f"pack {plan.pack_length:,}", colour=_GREEN))
        if not _cut_is_far(facts):
            marks.append(Mark(x=plan.max_seq_length, label=f"cut {plan.max_seq_length:,}", colour=_ORANGE))
    return histogram(lengths.histogram_edges, lengths.histogram_counts, marks, title="Lengths of training examples",
                     x_label="tokens in an example")


def _cut_is_far(facts: Facts) -> bool:
    """Whether max_seq_length is so far beyond every example that its line would only squeeze the bars."""
    if facts.plan is None or facts.data is None:
        return False
    return facts.plan.max_seq_length > 4 * max(facts.data.lengths.max, facts.plan.pack_length or 0)


def _packing(facts: Facts) -> list[tuple[int, float, bool]]:
    """Returns (pack length, share of real tokens, chosen)."""
    if facts.data is None:
        return []
    chosen = facts.plan.pack_length if facts.plan and facts.plan.pack else None
    return [(n, share, n == chosen) for n, share in sorted(facts.data.packing.items())]


def _choices(facts: Facts) -> list[tuple[str, str, str]]:
    """Returns (what, chosen, why): stages' own decisions, then the ops' implementations."""
    rows = [(str(c.get("what", "")), str(c.get("chosen", "")), str(c.get("reason", ""))) for c in facts.choices]
    if facts.plan:
        seen = {what for what, _, _ in rows}
        rows += [(f"op {op}", *_split(text)) for op, text in facts.plan.kernels.items() if f"op {op}" not in seen]
        rows += _settings(facts.plan)
    return rows


def _split(text: str) -> tuple[str, str]:
    chosen, _, reason = text.partition(":")
    return (chosen.strip(), reason.strip()) if reason else (text, "")


def _settings(plan: Plan) -> list[tuple[str, str, str]]:
    """Returns every plan value that did not stay at its default, with who set it."""
    rows = []
    for name, origin in plan.origins.items():
        value = getattr(plan, name, None)
        if origin != "default" and value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else _short(value)
            rows.append((flag_of(name), shown, f"from: {origin}"))
    return rows


def _folders(facts: Facts) -> list[tuple[Path, int, list[tuple[str, int, str]]]]:
    """Returns (folder, bytes, [(name, bytes, sha256)]) in the order of the journey."""
    groups: dict[Path, list[tuple[str, int, str]]] = {}
    run = facts.run
    for top in (run.adapter, run.weights, run.merged, run.mtp("trained"), run.mtp("default"), run.gguf):
        for item in facts.artifacts:
            if top in item.path.parents:
                groups.setdefault(top, []).append((str(item.path.relative_to(top)), item.bytes, item.sha256))
    return [(top, sum(size for _, size, _ in files), files) for top, files in groups.items()]
