"""What the wizard's screens show beside their questions: machine, model, rendered row, lengths. Drawing only."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sparktune.setup import strings
from sparktune.setup.histogram import Histogram
from sparktune.setup.machine.check import Check
from sparktune.setup.plan.schema import DatasetReport, Machine, ModelSpec
from sparktune.setup.preview import Preview, shorten

__all__ = ["heading", "length_screen", "machine_screen", "model_card", "preview_screen"]

_STYLE = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_MARK = {"ok": "ok", "warning": "!", "failed": "X"}
_LEARNED = "bold green"


def heading(number: int, count: int, title: str) -> RenderableType:
    """The line above a screen: where one is, and of how many."""
    return Group(Text(), Rule(Text.assemble((f"{number}/{count} ", "dim"), (title, "bold")), align="left", style="dim"))


def _facts(rows: Sequence[tuple[str, str | Text]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    return table


def machine_screen(machine: Machine, checks: Sequence[Check]) -> RenderableType:
    """Shows the machine in three lines, and every check; those that are well in one line together."""
    gpu = strings.NO_GPU if machine.device == "cpu" else f"{machine.gpu_name}, compute capability " + ".".join(
        str(n) for n in machine.capability or ()
    )
    shared = strings.SHARED if machine.unified_memory else ""
    rows: list[tuple[str, str | Text]] = [
        ("GPU", gpu), ("memory", f"{machine.memory_gib:.1f} GiB free{shared}"),
        ("disk", f"{machine.disk_free_gib:.0f} GiB free"), ("CPU", f"{machine.cpu_cores} cores"),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    bad = [c for c in checks if c.status != "ok"]
    for check in bad:
        text = Text(check.seen.rstrip(".") + ". ")
        text.append(check.fix, "bold" if check.status == "failed" else "")
        table.add_row(Text(_MARK[check.status], _STYLE[check.status]), check.name, text)
    well = [c.name for c in checks if c.status == "ok"]
    if well:
        table.add_row(Text("ok", "green"), strings.CHECKS_WELL, Text(", ".join(well)))
    return Group(_facts(rows), Text(), table)


def model_card(spec: ModelSpec) -> RenderableType:
    """Shows what a config.json says of a model."""
    kinds = ", ".join(
        f"{spec.layer_types.count(kind)} {kind.replace('_', ' ')}" for kind in dict.fromkeys(spec.layer_types)
    )
    native = Text(strings.NATIVE_YES, "green") if spec.native else Text(
        strings.NATIVE_NO.format(reason=spec.native_reason), "yellow"
    )
    count = spec.parameters
    return _facts([
        ("architecture", spec.model_type + (strings.MULTIMODAL if spec.multimodal else "")),
        ("parameters", f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count / 1e6:.2f} million"),
        ("layers", f"{spec.num_layers}: {kinds}"),
        ("context", f"{spec.max_position_embeddings:,} tokens"),
        ("MTP head", str(spec.mtp_layers) if spec.mtp_layers else strings.NOTHING),
        ("engine", native),
    ])


def preview_screen(preview: Preview, colours: bool) -> RenderableType:
    """Shows a rendered row; what is learned is green, or between marks where colour cannot be seen."""
    begin, end = ("", "") if colours else strings.LEARNED_MARKS
    body = Text()
    for text, learned in preview.parts:
        shown = shorten(text)
        if learned:
            body.append(begin + shown + end, _LEARNED if colours else "")
        else:
            body.append(shown, "dim" if colours else "")
    share = preview.learned / max(preview.tokens, 1)
    legend = Text.assemble(
        strings.PREVIEW.format(line=preview.line, format=preview.format, tokens=preview.tokens), " ",
        (strings.PREVIEW_LEARNED.format(learned=preview.learned, share=share), _LEARNED if colours else ""),
        "" if colours else " " + strings.PREVIEW_MARKS.format(begin=begin, end=end),
    )
    return Group(legend, Padding(body, (0, 0, 0, 2)))


def length_screen(report: DatasetReport, max_seq_length: int) -> RenderableType:
    """Shows lengths, what is learned of them, what was too long, and how full packs would be."""
    lengths = report.lengths
    left_out = report.dropped.get("over_length", 0)
    if left_out:
        over: str | Text = Text(strings.OVER_DROPPED.format(count=left_out, limit=max_seq_length), "yellow")
    elif report.truncated:
        over = Text(strings.OVER_CUT.format(count=report.truncated, limit=max_seq_length), "yellow")
    else:
        over = strings.OVER_NONE.format(limit=max_seq_length)
    fills = "   ".join(f"{n:,}: {share:.0%}" for n, share in report.packing.items())
    bars = Histogram(lengths.histogram_edges, lengths.histogram_counts, "tokens")
    return Group(bars, Text(), _facts([
        ("tokens", f"{lengths.total:,} in {lengths.count:,} examples; {report.supervised_tokens:,} learned "
                   f"({report.supervised_share:.0%})"),
        ("length", f"mean {lengths.mean:,.0f}, median {lengths.p50:,}, 90 % up to {lengths.p90:,}, "
                   f"99 % up to {lengths.p99:,}, longest {lengths.max:,}"),
        ("too long", over),
        ("packs filled", fills or strings.NOTHING),
    ]))
