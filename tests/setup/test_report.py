"""The report: what it shows of whole, failed and damaged runs; that it is self-contained and renders in a browser."""

from __future__ import annotations

import hashlib
import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparktune.setup.plan.config import resolve, save_plan
from sparktune.setup.plan.errors import UsageError
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import DatasetReport, LengthStats, RowProblem
from sparktune.setup.report import main, write_report
from sparktune.setup.report_svg import Mark, Series, histogram, line_chart, nice_ticks, short_number

HOSTILE = '</pre><script>document.title="owned"</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def _data_report(data: Path) -> DatasetReport:
    edges = [round(16 * 2 ** (i / 2)) for i in range(22)]
    counts = [math.ceil(300 * math.exp(-(((i - 8) / 4) ** 2))) for i in range(21)]
    lengths = LengthStats(count=sum(counts), total=900_000, mean=400, p50=260, p90=900, p99=4000, max=9000,
                          histogram_edges=edges, histogram_counts=counts)
    return DatasetReport(
        path=str(data), sha256="ab" * 32, bytes=999, rows=2100, kept=2090, train_examples=2050, eval_examples=40,
        formats={"messages": 2100}, dropped={"not_json": 3, "over_length": 7},
        problems=[RowProblem(line=17, code="not_json", text=f"expected JSON, seen {HOSTILE}")], lengths=lengths,
        supervised_tokens=300_000, supervised_share=0.33, multi_turn=120, with_system=300, with_thinking=0,
        duplicates=2, eval_leaks=1, packing={512: 0.84, 1024: 0.93}, cache_key="key", warnings=[HOSTILE],
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run with everything a report can show."""
    run = RunDir(name="lora-1", results_root=tmp_path / "results", output_root=tmp_path / "output")
    run.root.mkdir(parents=True)
    plan = resolve({"data": tmp_path / "d.jsonl", "mode": "lora", "pack_length": 1024, "output": tmp_path / "output",
                    "results": tmp_path / "results", "max_seq_length": 12000}, {}, {}, {})
    plan.kernels = {"rms_norm": "reference: no GPU here", "silu_mul": "reference"}
    save_plan(plan, run.plan)
    run.data_report.parent.mkdir()
    run.data_report.write_text(_data_report(tmp_path / "d.jsonl").model_dump_json())
    steps = [{"step": s, "epoch": s / 30, "loss": 3 / s + 0.5, "lr": 2e-4 / s, "grad_norm": 1 / s, "tokens": 1000,
              "supervised_tokens": 300, "tok_per_s": 500.0 + s, "peak_gib": 1.5} for s in range(1, 61)]
    evals = [{"step": s, "epoch": s / 30, "eval_loss": 4 / (s + 1) + 0.6} for s in (0, 30, 60)]
    _lines(run.metrics, sorted(steps + evals, key=lambda r: r["step"]))
    asked = f"What is 5 + 5? {HOSTILE}"
    _lines(run.samples, [
        *({"step": s, "prompt": asked, "answer": a} for s, a in ((0, "x"), (30, "5 + 5 = 9."), (60, "5 + 5 = 8."))),
        *({"step": s, "prompt": "only in training", "answer": a} for s, a in ((0, "zero"), (30, " "), (60, "end"))),
        {"stage": "before", "prompt": asked, "answer": HOSTILE, "source": "base"},
        {"stage": "after", "prompt": asked, "answer": "5 + 5 = 10.", "source": "merged"},
        {"stage": "after", "prompt": asked, "answer": "5 + 5 = 10.", "source": "gguf bf16"},
        {"stage": "after", "prompt": asked, "answer": "5 + 5 = 11.", "source": "gguf q8_0"},
        {"stage": "after", "kind": "perplexity", "value": 3.25},
    ])
    stages = ("prepare", "train", "merge", "mtp", "gguf", "evaluate")
    for stage in stages:
        choice = {"kind": "choice", "what": "engine", "chosen": "native", "reason": f"known {HOSTILE}"}
        _lines(run.stage_events(stage), [{"kind": "start"}, choice, {"kind": "end", "ok": True, "seconds": 2.0}])
    run.state.write_text(json.dumps({"stages": {s: {"input": "i", "output": "o", "seconds": 161.0} for s in stages}}))
    for folder, name in ((run.adapter, "adapter_model.safetensors"), (run.merged, "model.safetensors"),
                         (run.gguf, "lora-1-q8_0.gguf")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(name.encode() * 1000)
    run.mtp("default").mkdir()
    (run.mtp("default") / "model.safetensors").hardlink_to(run.merged / "model.safetensors")
    return run


class _Page(HTMLParser):
    """Collects elements and the text of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)


def _page(run: RunDir) -> _Page:
    return _Page(write_report(run.root).read_text(encoding="utf-8"))


def test_a_finished_run(run: RunDir) -> None:
    page = _page(run)
    ids = {a["id"] for _, a in page.tags if a.get("id")}
    assert {"status", "tiles", "samples", "training", "data", "packing", "drops", "stages", "artifacts", "replay",
            "choices", "versions"} <= ids
    assert "failure" not in ids
    assert page.count("svg") == 6  # loss, rate, throughput, memory, gradient norm, lengths
    for words in (
        "After: merged 5 + 5 = 10.", "gguf bf16: the same answer", "gguf q8_0 5 + 5 = 11.", "5 + 5 = 9.",
        "3 answers during training", "step 30 an empty answer", "Before: step 0 zero", "After: step 60 end",
        "perplexity", "3.25", "1,024 (this run)", "93.0 %", "over_length", "op rms_norm", "no GPU here", "from: flag",
        "./run.sh --non-interactive", "2 min 41 s", "transformers", "lora-1-q8_0.gguf", "pack 1,024", "cut 12,000",
        "complete",
    ):
        assert words in page.text, words


def test_summary(run: RunDir) -> None:
    write_report(run.root)
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    assert summary["status"] == "complete"
    assert summary["figures"]["steps"] == 60
    assert summary["figures"]["tokens"] == 60_000
    assert summary["figures"]["last_loss"] == pytest.approx(0.55)
    assert summary["figures"]["best_eval_loss"] == pytest.approx(4 / 61 + 0.6)
    assert summary["paths"]["merged"] == str(run.merged.resolve())
    assert all(Path(p).exists() for p in summary["paths"].values())
    assert summary["data"]["dropped"] == {"not_json": 3, "over_length": 7}
    assert summary["versions"]["python"]
    assert "--pack-length 1024" in summary["replay"]
    hashes = {Path(a["path"]).parent.name: a["sha256"] for a in summary["artifacts"]}
    expected = hashlib.sha256(b"model.safetensors" * 1000).hexdigest()
    assert hashes["lora-1"] == hashes["lora-1-mtp-default"] == expected


def test_nothing_of_a_hostile_run_becomes_markup(run: RunDir) -> None:
    page = _page(run)
    assert page.count("script") == page.count("img") == page.count("link") == page.count("iframe") == 0
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on") or a in ("src", "href")]
    assert page.text.count('<script>document.title="owned"</script>') >= 4
    assert "{{ 7 * 7 }}" in page.text


def test_nothing_in_the_page_asks_the_network(run: RunDir) -> None:
    text = write_report(run.root).read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"https?://|\bsrc=[\"']", text)


def test_a_failed_run(run: RunDir) -> None:
    for stage in ("merge", "mtp", "gguf", "evaluate"):
        run.stage_events(stage).unlink()
    _lines(run.stage_events("train"), [
        {"kind": "start"}, {"kind": "end", "ok": True, "seconds": 1.0}, {"kind": "start"},
        {"kind": "message", "level": "error", "text": "The loss is nan at step 7."},
        {"kind": "end", "ok": False, "seconds": 3.0},
    ])
    run.state.write_text(json.dumps({"stages": {"prepare": {"seconds": 1.0}}}))
    page = _page(run)
    assert "The stage train failed." in page.text
    assert "The loss is nan at step 7." in page.text
    summary = json.loads(run.summary.read_text())
    assert (summary["status"], summary["failed_stage"]) == ("failed", "train")
    assert summary["errors"] == ["The loss is nan at step 7."]


def test_a_killed_stage_counts_as_failed(run: RunDir) -> None:
    _lines(run.stage_events("gguf"), [{"kind": "start"}])
    run.state.write_text(json.dumps({"stages": {}}))
    run.stage_events("evaluate").unlink()
    assert "The stage gguf failed." in _page(run).text


@pytest.mark.parametrize(
    "gone", ["metrics.jsonl", "samples.jsonl", "data/report.json", "state.json", "stages", "adapter", "plan.yaml"]
)
def test_every_part_may_be_missing_or_damaged(run: RunDir, gone: str) -> None:
    path = run.root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "Before and after" in _page(run).text or gone == "samples.jsonl"
    if path.suffix:
        path.write_text('{"step": 1, "loss": ', encoding="utf-8")
        page = _page(run)
        assert "unreadable" in page.text
        assert json.loads(run.summary.read_text())["missing"]


def test_only_a_plan(run: RunDir) -> None:
    for path in run.root.iterdir():
        if path.name != "plan.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = _page(run)
    assert "incomplete" in page.text
    assert "metrics.jsonl: not there" in page.text


def test_a_step_logged_twice_counts_once(run: RunDir) -> None:
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 60, "loss": 0.25, "tokens": 1000, "tok_per_s": 1, "peak_gib": 2.5}) + "\n")
    write_report(run.root)
    figures = json.loads(run.summary.read_text())["figures"]
    assert (figures["tokens"], figures["last_loss"], figures["peak_gib"]) == (60_000, 0.25, 2.5)


def test_numbers_that_are_none_or_not_finite(run: RunDir) -> None:
    _lines(run.metrics, [{"step": 1, "loss": None, "lr": 1e-4, "tok_per_s": 5, "peak_gib": 1, "tokens": 3},
                         {"step": 2, "loss": math.nan, "lr": 1e-4, "tok_per_s": 5, "peak_gib": 1, "tokens": 3}])
    page = _page(run)
    assert page.count("svg") == 4  # rate, throughput, memory, lengths
    json.loads(run.summary.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_the_stage_reports_itself_and_refuses_other_folders(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(run.root)]) == 0
    kinds = [json.loads(line)["kind"] for line in run.stage_events("report").read_text().splitlines()]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert "artifact" in kinds
    assert main(["--run", str(tmp_path / "none")]) == 2
    assert "should be a run's folder" in capsys.readouterr().err
    with pytest.raises(UsageError):
        write_report(tmp_path)


def test_an_unwritable_folder(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(run.root)
    before = run.report.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    assert main(["--run", str(run.root)]) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert run.report.read_bytes() == before
    assert not list(run.root.glob(".*partial"))


# -- charts


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 3.2, [0, 1, 2, 3, 4]), (5, 5, None), (0, 0, None), (1e-5, 9e-5, None)],
)
def test_nice_ticks(low: float, high: float, ticks: list[float] | None) -> None:
    got = nice_ticks(low, high)
    assert len(got) >= 3
    assert got[0] <= low
    assert got[-1] >= high - 1e-12
    if ticks:
        assert got == pytest.approx(ticks)


def test_short_number() -> None:
    shown = [short_number(v) for v in (0, 2e-4, 0.25, 1234, 12345, 3.2e6)]
    assert shown == ["0", "2e-4", "0.25", "1234", "12.3k", "3.2M"]


def test_long_runs_stay_small() -> None:
    points = [(float(i), math.sin(i / 500)) for i in range(100_000)]
    svg = line_chart([Series(name="loss", points=points, smooth=True)], title="t", x_label="step", y_label="y")
    assert len(svg) < 60_000
    assert "step 99999" in svg


def test_charts_of_nothing_and_of_one_point() -> None:
    assert line_chart([Series(name="a", points=[])], title="t", x_label="x", y_label="y") == ""
    one = line_chart([Series(name="a", points=[(1, 2)])], title="t", x_label="x", y_label="y")
    assert 'class="dot"' in one
    assert histogram([0, 1], [0], [], title="t", x_label="x") == ""
    assert histogram([0, 1, 2], [3], [], title="t", x_label="x") == ""


def test_a_cut_far_beyond_the_data_is_said(run: RunDir) -> None:
    text = run.plan.read_text().replace("max_seq_length: 12000", "max_seq_length: 99000")
    run.plan.write_text(text)
    assert "The cut at 99,000 tokens is far beyond the longest example." in _page(run).text


def test_histogram_marks_and_bars() -> None:
    svg = histogram([10, 20, 40], [4, 2], [Mark(x=100, label="pack <100>")], title="t", x_label="x")
    assert svg.count("<rect") == 2
    assert "10 to 20 tokens: 4 examples" in svg
    assert "pack &lt;100&gt;" in svg


# -- in a browser


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"This test renders the report in headless Chromium; install one of {', '.join(BROWSERS)}."
    return found


def _browse(browser: str, tmp_path: Path, *words: str) -> str:
    command = [browser, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_it_renders_in_chromium(run: RunDir, browser: str, tmp_path: Path) -> None:
    report = write_report(run.root)
    page = _Page(_browse(browser, tmp_path, "--dump-dom", report.as_uri()))
    assert page.count("svg") == 6
    assert page.count("script") == page.count("img") == 0
    assert "lora-1 - sparktune report" in page.text
    assert "5 + 5 = 10." in page.text
    picture = tmp_path / "page.png"
    _browse(browser, tmp_path, "--window-size=1200,2000", f"--screenshot={picture}", report.as_uri())
    assert picture.stat().st_size > 40_000  # an empty page of this size compresses to under 10 kB


@pytest.mark.parametrize("width", [360, 1080])
def test_nothing_is_wider_than_the_screen(run: RunDir, browser: str, tmp_path: Path, width: int) -> None:
    # A frame of that width measures the page: headless windows do not go below 500 pixels.
    text = write_report(run.root).read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(text)}"></iframe>'
        "<script>window.onload = () => { const d = document.getElementById('f').contentDocument;"
        " document.body.append('measured ' + d.documentElement.scrollWidth + ' title ' + d.title); }</script>",
        encoding="utf-8",
    )
    seen = re.search(r"measured (\d+) title (.*?)<", _browse(browser, tmp_path, "--dump-dom", frame.as_uri()))
    assert seen
    assert int(seen[1]) == width
    assert seen[2] == "lora-1 - sparktune report"  # no script of the hostile texts ran
