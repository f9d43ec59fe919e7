"""A rehearsal that found the machine cold is done once more; its signals, its end, and what counts as cold."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from sparktune.setup.plan.eta import Calibration
from sparktune.training.warmth import COLD, Warmth, run_until_warm

RESULT = Calibration(
    steps=15, train_s=10.0, low_s=9.0, high_s=11.0, tok_per_s=1.0, peak_gib=1.0, device="cpu", parts={"steps": 10.0}
)
CHILD = """
import os, signal, sys, time
from pathlib import Path
place, codes, attempt = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[-1])
with (place / "attempts").open("a") as file:
    file.write(f"{attempt} ")
code = codes[attempt - 1]
if code == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    (place / "ready").touch()
    time.sleep(60)
if code == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if code == "0":
    (place / "calibration.json").write_text((place / "made.json").read_text())
    time.sleep(0.4)
sys.exit(int(code))
"""


def _run(place: Path, *codes: str) -> tuple[int, str]:
    (place / "made.json").write_text(RESULT.model_dump_json())
    (place / "child.py").write_text(CHILD)
    command = [sys.executable, str(place / "child.py"), str(place), ",".join(codes)]
    return run_until_warm(command, place / "calibration.json"), (place / "attempts").read_text()


@pytest.mark.parametrize(("codes", "code", "attempts"), [
    (("0",), 0, "1 "), ((str(COLD), "0"), 0, "1 2 "), ((str(COLD), str(COLD)), COLD, "1 2 "),
    ((str(COLD), "5"), 5, "1 2 "), (("5", "0"), 5, "1 "), (("die",), 128 + signal.SIGKILL, "1 "),
])
def test_a_cold_machine_is_tried_once_more(tmp_path: Path, codes: tuple[str, ...], code: int, attempts: str) -> None:
    assert _run(tmp_path, *codes) == (code, attempts)


def test_what_the_process_takes_to_end_is_added(tmp_path: Path) -> None:
    assert _run(tmp_path, "0")[0] == 0
    found = Calibration.model_validate_json((tmp_path / "calibration.json").read_bytes())
    end = found.parts["end"]
    assert end >= 0.4
    assert (found.train_s, found.low_s, found.high_s) == pytest.approx((10 + end, 9 + end, 11 + end), abs=0.02)


def test_a_signal_reaches_the_rehearsal_and_nothing_is_tried_again(tmp_path: Path) -> None:
    def press() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    def mine(number: int, frame: object) -> None:
        raise AssertionError("the signal is the rehearsal's")

    before = signal.signal(signal.SIGTERM, mine)
    presser = threading.Thread(target=press)
    presser.start()
    try:
        assert _run(tmp_path, "wait", "0") == (130, "1 ")
        presser.join()
        assert signal.getsignal(signal.SIGTERM) is mine, "the parent's own handlers are back"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_new_compiled_files_make_the_first_attempt_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("sparktune.training.warmth._read_bytes", lambda: 0)
    first, second = Warmth(1), Warmth(2)
    assert not first.is_cold()
    (tmp_path / "triton" / "abc").mkdir(parents=True)
    (tmp_path / "triton" / "abc" / "kernel.cubin").touch()
    assert first.is_cold()
    assert "1 compiled files" in first.why
    assert not second.is_cold(), "what is cold at the second attempt is cold for a run too"
    assert first.since_start_s() > 0
