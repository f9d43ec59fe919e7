"""Experiment trackers: what a training reports also goes to W&B, MLflow or Trackio, by their own libraries.

They run in the parent, not in the training process: a stage in a container has no network, and a tracker that fails
must never end a training. Where their data goes is each library's own business (WANDB_MODE=offline,
MLFLOW_TRACKING_URI, TRACKIO_DIR ...); no token passes through here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any, Protocol

from sparktune.setup import strings
from sparktune.setup.plan.rundir import RunDir
from sparktune.setup.plan.schema import Plan
from sparktune.setup.plan.untrusted import without_credentials

__all__ = ["Tracking", "open_tracking"]

_METRICS = ("loss", "eval_loss", "lr", "grad_norm", "tok_per_s", "peak_gib", "epoch", "tokens", "supervised_tokens")
_NOT_LOGGED = ("origins", "kernels", "schema_version")


class _Tracker(Protocol):
    """One library, reduced to what is needed here."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records figures of one step."""

    def finish(self, ok: bool) -> None:
        """Ends the tracker's run."""


def _settings(plan: Plan) -> dict[str, Any]:
    """Returns the plan as a tracker's configuration: JSON values, without bookkeeping."""
    return {k: v for k, v in plan.model_dump(mode="json").items() if k not in _NOT_LOGGED and v is not None}


class _Wandb:
    def __init__(self, plan: Plan, run: RunDir) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=plan.tracker_project, name=run.name, id=run.name, resume="allow", dir=str(run.root),
            config=_settings(plan), settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


class _Mlflow:
    """MLflow; without MLFLOW_TRACKING_URI its data lies in results/mlflow.db."""

    def __init__(self, plan: Plan, run: RunDir) -> None:
        from mlflow import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.results_root / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=where)
        known = run.root / "tracker.json"
        self._id: str = json.loads(known.read_text(encoding="utf-8"))["mlflow"] if known.is_file() else ""
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(plan.tracker_project)
        folder = (run.results_root / "mlflow-artifacts").absolute().as_uri()
        number = experiment.experiment_id if experiment else None
        number = number or self._client.create_experiment(plan.tracker_project, folder)
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        for key, value in _settings(plan).items():
            self._client.log_param(self._id, key, value)
        known.write_text(json.dumps({"mlflow": self._id}), encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=step)

    def finish(self, ok: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if ok else "FAILED")


class _Trackio:
    def __init__(self, plan: Plan, run: RunDir) -> None:
        import trackio

        self._library: Any = trackio
        trackio.init(project=plan.tracker_project, name=run.name, config=_settings(plan), resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._library.log(dict(values), step=step)

    def finish(self, ok: bool) -> None:
        self._library.finish()


_KINDS: dict[str, Callable[[Plan, RunDir], _Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}


def _lost(name: str, error: Exception) -> str:
    """Returns the sentence; a library's error may quote an address with a password in it."""
    return strings.TRACKER_LOST.format(name=name, why=without_credentials(f"{type(error).__name__}: {error}"))


class Tracking:
    """Sends a training's events to the tracker; the first failure is told and ends the tracking, not the training.

    Args:
        tracker: the library, or None for none.
        say: takes a sentence and its level.
    """

    def __init__(self, tracker: _Tracker | None, name: str, say: Callable[[str, str], None]) -> None:
        self._tracker, self._name, self._say = tracker, name, say

    def event(self, event: Mapping[str, Any]) -> None:
        """Takes one event; those without figures of a step are passed over."""
        if event.get("kind") != "metric" or not isinstance(event.get("step"), int):
            return
        values = {k: float(event[k]) for k in _METRICS if isinstance(event.get(k), int | float)}
        if values:
            self._guarded(lambda tracker: tracker.log(event["step"], values))

    def finish(self, ok: bool) -> None:
        """Ends the tracker's run."""
        self._guarded(lambda tracker: tracker.finish(ok))
        self._tracker = None

    def _guarded(self, work: Callable[[_Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            with redirect_stdout(sys.stderr):
                work(self._tracker)
        except Exception as error:  # a library of others, often over a network: anything may come
            self._tracker = None
            self._say(_lost(self._name, error), "warning")


def open_tracking(plan: Plan, run: RunDir, say: Callable[[str, str], None], stage: str = "train") -> Tracking:
    """Returns the tracking of a stage: training's goes to the plan's tracker, no other stage's does.

    Where the library refuses to start, that is told and nothing is tracked.
    """
    if plan.tracker == "none" or stage != "train":
        return Tracking(None, "none", say)
    try:
        with redirect_stdout(sys.stderr):  # they greet on standard output, which carries data only
            return Tracking(_KINDS[plan.tracker](plan, run), plan.tracker, say)
    except Exception as error:  # see Tracking._guarded
        say(_lost(plan.tracker, error), "warning")
        return Tracking(None, plan.tracker, say)

