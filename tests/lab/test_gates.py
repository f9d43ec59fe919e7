"""The six gates: what each of them calls a pass, and what the table says of one that dies."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from sparktune.lab import gates
from sparktune.lab.gates import GATES, bands, hundred_steps, kept_pins, main


def test_a_pin_that_is_not_kept_is_named() -> None:
    here = importlib.metadata.version("pytest")
    lock = (f"pytest=={here} \\\n    --hash=sha256:00\n"
            "Jinja2==0.0.1 \\\n    --hash=sha256:00\n"
            "no-such-package==1.0 \\\n    --hash=sha256:00\n"
            'other-system==2.0 ; sys_platform == "nothing" \\\n    --hash=sha256:00\n')
    wrong = kept_pins(lock)
    assert [text.split()[0] for text in wrong] == ["Jinja2", "no-such-package"]
    assert wrong[1] == "no-such-package 1.0 is pinned, seen: not installed"
    assert kept_pins(f"pytest=={here}\n") == []


@pytest.mark.parametrize(("kind", "size_gb", "good"), [
    ("q4_k_m", 4.7, True), ("q4_k_m", 3.9, False), ("q4_k_m", 5.6, False), ("q8_0", 8.7, True), ("q8_0", 9.6, False),
])
def test_an_8b_models_files_are_held_against_the_published_bands(kind: str, size_gb: float, good: bool) -> None:
    manifest = {"files": [{"type": kind, "bytes": int(size_gb * 1e9), "predicted_bytes": int(size_gb * 1e9)}]}
    assert bands(manifest, 8_190_735_360)[0] is good


def test_a_small_models_files_are_held_against_their_prediction() -> None:
    file = {"type": "q8_0", "bytes": 5_000_000, "predicted_bytes": 5_100_000}
    assert bands({"files": [file]}, 4_000_000)[0]
    assert not bands({"files": [file, file | {"bytes": 9_000_000}]}, 4_000_000)[0]


@pytest.mark.parametrize(("peaks", "loaded", "losses", "good"), [
    ([15.9], 15.26, (2.0, 1.0), True), ([16.14], 15.26, (2.0, 1.0), False), ([15.9], 15.26, (1.0, 2.0), False),
    ([99.0], None, (2.0, 1.0), True),  # a CPU reports, it does not judge
])
def test_a_hundred_steps_must_stay_within_five_percent_of_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peaks: list[float], loaded: float | None,
    losses: tuple[float, float], good: bool,
) -> None:
    def train(work: Path, name: str, steps: int, **settings: Any) -> None:
        rows = [{"loss": losses[i > 0], "peak_gib": peaks[0] if i == 50 else 1.0} for i in range(steps)]
        folder = work / "results" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    monkeypatch.setattr(gates, "_train", train)
    (tmp_path / "load.json").write_text(json.dumps({"peak_gib": loaded}))
    assert hundred_steps(tmp_path)["passed"] is good


def test_a_gate_that_dies_is_a_row_with_its_last_words_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: dict[str, dict[str, Any]] = {g.name: {"passed": True, "seen": "fine"} for g in GATES} | {
        "prepare": {"passed": True, "seen": "made"}, "load": {"passed": True, "seen": "loaded", "peak_gib": 15.26}}
    # a real process that fails at once: the folder it shall work in has no model
    real = gates._run
    monkeypatch.setattr(gates, "_run", lambda n, work: real(n, work) if n == "gguf" else (said[n], 1.0, 0.5))
    assert main(["--work", str(tmp_path / "w"), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["passed"] for row in rows] == [True, True, True, True, True, False, True]
    assert rows[5]["seen"].startswith("exit code 2: ")
    assert "/w/model should be an existing folder" in rows[5]["seen"]
    assert [row["peak_gib"] for row in rows[:4]] == [0.5, 0.5, 15.26, 0.5]
    assert (tmp_path / "w" / "gate-gguf.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_gate_but_the_networks_passes_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command. Gate 1 judges the environment that runs it: here that of development, so it is left out."""
    monkeypatch.setattr(gates, "GATES", [g for g in GATES if g.name != "install"])
    assert main(["--work", str(tmp_path / "w"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 6
    assert all(row["passed"] and row["seconds"] > 0 and row["peak_gib"] > 0 for row in rows)
