"""The agent's settings, on torch versions that know them all and on those that do not."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from sparktune.training import launch


@pytest.mark.parametrize("knows", [True, False])
def test_a_torch_without_a_shutdown_timeout_is_given_none(knows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11's LaunchConfig has none, and `train.py --gpus 2` ended in a TypeError there."""
    api = importlib.import_module("torch.distributed.launcher.api")
    names = ["min_nodes", "max_nodes", "nproc_per_node", "max_restarts", "logs_specs", "signals_to_handle",
             "rdzv_backend", "rdzv_endpoint", "run_id", *(["shutdown_timeout"] if knows else [])]
    stand_in = dataclasses.make_dataclass("LaunchConfig", [(name, object) for name in names])
    monkeypatch.setattr(api, "LaunchConfig", stand_in)
    made = launch._config(2, None)
    assert made.nproc_per_node == 2
    assert made.signals_to_handle == "SIGQUIT"
    assert getattr(made, "shutdown_timeout", None) == (600 if knows else None)
