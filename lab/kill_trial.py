"""One trial of lab/kill_matrix.py: a run that is interrupted, looked at, resumed, and compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparktune.lab.kill_world import NAME, Session, World, alive, hashes, kill_group
from sparktune.setup.plan.config import load_plan
from sparktune.setup.plan.errors import SparktuneError
from sparktune.training.checkpoint import checkpoints_of, validate

__all__ = ["INTERRUPTIONS", "STAGES_KILLED", "Outcome", "Trial", "differing_files", "run_trial"]

STAGES_KILLED = ("prepare", "train", "checkpoint", "merge", "mtp", "gguf", "evaluate", "report")
"""Where trials strike; `checkpoint` is the stage train at the moment a checkpoint is being written."""
INTERRUPTIONS = (
    "kill-all", "kill-stage", "kill-parent", "kill-at-operation", "term", "term-stage", "int", "int-twice", "hangup",
)
STOP_LIMIT_S = 10.0
_ALLOWED = {
    "kill-all": {-signal.SIGKILL}, "kill-parent": {-signal.SIGKILL}, "kill-stage": {137}, "kill-at-operation": {137},
    "term": {75, 130}, "term-stage": {75, 130}, "int": {75, 130}, "int-twice": {75, 130}, "hangup": {75, 130},
}
"""Exit codes of the interrupted run; 0 where it ended before the interruption came."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is done to one run."""

    number: int
    stage: str
    how: str
    moment: float
    """0 to 1: where in the stage, by time or by operations on files."""
    gap_s: float
    """Between two signals."""


@dataclass(kw_only=True)
class Outcome:
    """What came of a trial."""

    trial: Trial
    code: int | None = None
    """Exit code of the interrupted run; negative for a signal."""
    stop_s: float | None = None
    """From SIGTERM in training to the end of the process, where a checkpoint was owed."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Returns the outcome in a line."""
        t, said = self.trial, "ok" if not self.wrong else "FAILED: " + self.wrong[0]
        return f"#{t.number} {t.stage} {t.how} at {t.moment:.3f}: exit {self.code}, {self.seconds:.1f} s, {said}"



def run_trial(world: World, trial: Trial) -> Outcome:
    """Runs one trial in a folder of its own, which is removed when nothing was wrong."""
    begun = time.monotonic()
    outcome = Outcome(trial=trial)
    place = world.folder / "trials" / f"{trial.number:04d}"
    shutil.rmtree(place, ignore_errors=True)
    stage = "train" if trial.stage == "checkpoint" else trial.stage
    _start_from(world, stage, place)
    fatal = None
    if trial.how == "kill-at-operation":
        fatal = (stage, 1 + int(trial.moment * world.operations[stage]))
    session = Session(world, place, fatal=fatal, own_cache=stage == "prepare")
    try:
        _interrupt(world, trial, stage, session, outcome)
        _look(world, place, outcome)
        _resume(world, trial, stage, session, outcome)
    except Exception as error:  # one broken trial must not end the others
        outcome.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        session.end_all()
    outcome.seconds = time.monotonic() - begun
    if not outcome.wrong:
        shutil.rmtree(place)
    return outcome


def _start_from(world: World, stage: str, place: Path) -> None:
    """Copies the state before `stage`; the plan's own paths follow it."""
    if stage == "prepare":
        place.mkdir(parents=True)
        return
    shutil.copytree(world.folder / f"before-{stage}", place, symlinks=True)
    for name in ("started", "said.txt"):
        (place / name).unlink(missing_ok=True)
    plan = place / "results" / NAME / "plan.yaml"
    plan.write_text(plan.read_text(encoding="utf-8").replace(str(world.folder / "second"), str(place)),
                    encoding="utf-8")


def _command(world: World, place: Path) -> list[str]:
    """Returns what a user types: the run's name is known, or the run has none yet."""
    return ["resume", NAME] if (place / "results" / NAME / "plan.yaml").is_file() else world.arguments()


def _interrupt(world: World, trial: Trial, stage: str, session: Session, outcome: Outcome) -> None:
    """Starts the run and interrupts it; leaves the interrupted run's code in the outcome."""
    session.start(_command(world, session.place), terminal=trial.how == "hangup")
    _until(lambda: stage in session.started() or session.poll() is not None)
    began = session.started().get(stage, 0)
    if trial.how != "kill-at-operation":
        _wait_for_moment(world, trial, stage, session)
        _strike(trial, session, began, outcome)
    code = session.wait()
    outcome.code = code
    if code is None:
        outcome.wrong.append("the interrupted run did not end")
        return
    if code not in _ALLOWED[trial.how] | {0}:
        outcome.wrong.append(f"the interrupted run ended with {code}, expected {sorted(_ALLOWED[trial.how])}: "
                             f"{session.said()[-1500:]}")
    if outcome.stop_s is not None:
        _check_stop(session.place, code, outcome)


def _wait_for_moment(world: World, trial: Trial, stage: str, session: Session) -> None:
    if trial.stage == "checkpoint":
        root, number = session.place / "results" / NAME, 2 * (1 + int(trial.moment * 3))
        _until(lambda: (root / f".checkpoint-{number}.partial").exists()
               or (root / f"checkpoint-{number}").exists() or session.poll() is not None, pause_s=0.0)
        time.sleep(trial.gap_s * 0.03)
        return
    deadline = time.monotonic() + trial.moment * world.seconds[stage] * 1.05
    _until(lambda: time.monotonic() > deadline or session.poll() is not None)


def _strike(trial: Trial, session: Session, stage_pid: int, outcome: Outcome) -> None:
    how, begun = trial.how, time.monotonic()
    if session.poll() is not None:
        return
    if how in ("kill-all", "kill-parent"):
        kill_group(session.pid, signal.SIGKILL)
    if how == "kill-all":
        session.wait(10)
        for pid in session.started().values():
            kill_group(pid, signal.SIGKILL)
        _until(lambda: not any(alive(pid) for pid in session.started().values()))
    elif how == "kill-stage":
        kill_group(stage_pid, signal.SIGKILL)
    elif how == "hangup":
        session.hang_up()
    elif how in ("term", "int", "int-twice"):
        os.kill(session.pid, signal.SIGTERM if how == "term" else signal.SIGINT)
    elif how == "term-stage" and alive(stage_pid):
        os.kill(stage_pid, signal.SIGTERM)
    if how == "int-twice":
        _until(lambda: time.monotonic() - begun > trial.gap_s or session.poll() is not None)
        if session.poll() is None:
            os.kill(session.pid, signal.SIGINT)
    if how in ("term", "term-stage") and trial.stage in ("train", "checkpoint"):
        session.wait()
        outcome.stop_s = time.monotonic() - begun


def _check_stop(place: Path, code: int, outcome: Outcome) -> None:
    """After SIGTERM in training: a checkpoint of the last step, in time."""
    root = place / "results" / NAME
    metrics = root / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    if code != 75 or not any(steps):
        outcome.stop_s = None  # it ended by itself, or there was nothing yet to save
        return
    saved = [int(path.name.partition("-")[2]) for path in checkpoints_of(root)]
    if not saved or saved[0] != steps[-1]:
        outcome.wrong.append(f"SIGTERM left checkpoints {saved}, the last step was {steps[-1]}")
    if outcome.stop_s is not None and outcome.stop_s > STOP_LIMIT_S:
        outcome.wrong.append(f"SIGTERM to the end took {outcome.stop_s:.1f} s")


def _look(world: World, place: Path, outcome: Outcome) -> None:
    """Looks at what lies there after the interruption: whatever has its final name must be whole."""
    root, found = place / "results" / NAME, _hashes_beside_a_writer(place)
    for path, digest in found.items():
        expected = world.files.get(path)
        # a card is written anew after the evaluation, samples and the report's figures grow with the stages
        if expected is not None and digest != expected and not path.endswith(("README.md", "samples.jsonl",
                                                                              "summary.json")):
            outcome.wrong.append(f"after the interruption {path} was there and not what it must be")
    for folder in {str(Path(p).parent) for p in world.files} & {str(Path(p).parent) for p in found}:
        missing = [p for p in world.files if str(Path(p).parent) == folder and p not in found]
        if missing and folder not in (f"results/{NAME}", f"results/{NAME}/mtp"):
            outcome.wrong.append(f"after the interruption {folder} lacked {', '.join(missing)}")
    for kept in (root, root / "mtp"):
        for checkpoint in checkpoints_of(kept):
            try:
                validate(checkpoint)
            except SparktuneError as error:
                outcome.wrong.append(f"after the interruption: {error}")
    if (root / "plan.yaml").is_file():
        load_plan(root / "plan.yaml")
    for name in ("state.json", "summary.json"):
        if (root / name).is_file():
            json.loads((root / name).read_text(encoding="utf-8"))


def _hashes_beside_a_writer(place: Path) -> dict[str, str]:
    """Hashes what lies there; once more when a stage that outlived its parent removed an old checkpoint meanwhile."""
    for _ in range(20):
        try:
            return hashes(place, whole=False)
        except FileNotFoundError:
            time.sleep(0.05)
    return hashes(place, whole=False)


def _resume(world: World, trial: Trial, stage: str, session: Session, outcome: Outcome) -> None:
    """Goes on with the run as a user would, and compares its end."""
    place = session.place
    command = _command(world, place)
    orphans = [pid for pid in session.started().values() if alive(pid)]
    again = Session(world, place, own_cache=stage == "prepare")
    if orphans and command[0] == "resume":
        code = again.run(command)
        if code != 3 and any(map(alive, orphans)):
            outcome.wrong.append(f"a resume while the stage still ran ended with {code}, expected 3")
        elif code == 3 and "Another process" not in again.said():
            outcome.wrong.append("a resume while the stage still ran did not say why it cannot")
    _until(lambda: not any(map(alive, orphans)))
    code = again.run(_command(world, place))
    again.end_all()
    if code != 0:
        outcome.wrong.append(f"the resume ended with {code}: {again.said()[-1500:]}")
        return
    found = hashes(place)
    differing = differing_files(found, world.files)
    if differing:
        outcome.wrong.append(f"{len(differing)} files differ from the uninterrupted run's: {', '.join(differing[:5])}")
    left = [str(p.relative_to(place)) for top in ("results", "output") for p in (place / top).rglob("*")
            if "partial" in p.name or p.name.startswith(".pending-")]
    if left:
        outcome.wrong.append(f"left over after the end: {', '.join(left[:5])}")


def differing_files(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Returns the files that are not the uninterrupted run's.

    A stop between two of the plan's checkpoints leaves one of its own, and the oldest kept makes way for it: what only
    one of the runs has of these is passed over, as long as both keep as many and the last is the same.

    Args:
        found: path -> hash of the resumed run.
        expected: path -> hash of the uninterrupted one.
    """
    differing = sorted(p for p in found.keys() | expected.keys() if found.get(p) != expected.get(p))
    ours, theirs = _checkpoints(found), _checkpoints(expected)
    if ours and theirs and len(ours) == len(theirs) and max(ours) == max(theirs):
        odd = ours ^ theirs
        differing = [p for p in differing if _checkpoint(p) not in odd]
    return differing


def _checkpoint(path: str) -> int | None:
    """The step of training's checkpoint that a file belongs to."""
    found = re.match(rf"results/{NAME}/checkpoint-(\d+)/", path)
    return int(found[1]) if found else None


def _checkpoints(paths: Iterable[str]) -> set[int]:
    return {step for path in paths if (step := _checkpoint(path)) is not None}


def _until(condition: Callable[[], bool], pause_s: float = 0.002, patience_s: float = 600.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not come")
        time.sleep(pause_s)
