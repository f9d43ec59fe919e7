"""The doctor's checks: each in the state it looks for, and in a healthy one; nvidia-smi is a script on PATH."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sparktune.setup.machine import doctor, host_checks
from sparktune.setup.machine.gauges import GaugeReader, read_gauges
from sparktune.setup.plan.schema import Plan

SMI = """#!/bin/sh
case "$*" in
  *name,compute_cap*) echo "{name}, {capability}, {free}";;
  *driver_version*) echo "{driver}";;
  *temperature.gpu,clocks.sm*) echo "61, 2418, 3003, 97, [N/A]";;
  *clocks.sm,clocks.max.sm*) echo "{clocks}";;
  *) echo "| NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda}  |";;
esac
"""
GB10 = {"name": "NVIDIA GB10", "capability": "12.1", "free": "[N/A]", "driver": "580.95.05", "cuda": "13.0",
        "clocks": "2418, 3003, 61, 97, P0"}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(**changes: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "nvidia-smi").write_text(SMI.format(**{**GB10, **changes}))
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return install


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(results=tmp_path / "results", output=tmp_path / "output")


def test_a_healthy_gb10(gpu: Callable[..., None], plan: Plan) -> None:
    gpu()
    for check in (host_checks.check_driver, host_checks.check_clocks, host_checks.check_os):
        assert check(plan).status == "ok", check(plan)
    assert "580.95.05, CUDA 13.0" in host_checks.check_driver(plan).seen
    assert "2418 of 3003 MHz" in host_checks.check_clocks(plan).seen


@pytest.mark.parametrize(("changes", "check", "words"), [
    ({"driver": "570.86.10", "cuda": "12.8"}, host_checks.check_driver, ["570.86.10", "580"]),
    ({"clocks": "208, 3003, 45, 96, P8"}, host_checks.check_clocks, ["208", "96 %", "power"]),
    ({"clocks": "1200, 3003, 91, 96, P0"}, host_checks.check_clocks, ["91 °C", "hot"]),
])
def test_what_holds_a_gpu_back(
    gpu: Callable[..., None], plan: Plan, changes: dict[str, str], check: Callable, words: list[str]
) -> None:
    gpu(**changes)
    found = check(plan)
    assert found.status == "warning"
    assert all(w in found.seen + found.fix for w in words), found


def test_figures_that_nvml_does_not_give_are_named(gpu: Callable[..., None]) -> None:
    gpu()
    found = read_gauges()
    assert (found.temperature_c, found.clock_mhz, found.power_w) == (61, 2418, None)
    assert "not readable here: power" in found.words()


def test_without_a_driver_the_gauges_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = read_gauges()
    assert "no nvidia-smi answers" in found.words()
    assert found.available_gib is not None
    reader = GaugeReader(every_s=0.01)
    reader.close()
    assert reader.latest is None or reader.latest.absent


def test_stale_page_cache_on_shared_memory(
    gpu: Callable[..., None], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_checks, "meminfo_gib", lambda: {"Cached": 60.0, "MemTotal": 121.7})
    assert host_checks.check_page_cache(plan).status == "ok", "no GPU shares the memory here"
    gpu()
    found = host_checks.check_page_cache(plan)
    assert (found.status, "drop_caches" in found.fix) == ("warning", True)
    gpu(name="NVIDIA H200", capability="9.0", free="140000")
    assert host_checks.check_page_cache(plan).status == "ok"


def test_the_container_toolkit_is_wanted_where_a_container_gets_the_gpu(
    gpu: Callable[..., None], plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert host_checks.check_toolkit(plan).status == "warning"
    wanted = plan.model_copy(update={"backend": "docker"})
    assert host_checks.check_toolkit(wanted).status == "failed"
    assert "nvidia-ctk" in host_checks.check_toolkit(wanted).fix
    assert host_checks.check_toolkit(plan.model_copy(update={"backend": "local"})).status == "ok"
    (tmp_path / "bin" / "nvidia-ctk").write_text("")
    (tmp_path / "bin" / "nvidia-ctk").chmod(0o755)
    assert host_checks.check_toolkit(wanted).status == "ok"


def test_an_engine_that_does_not_answer(
    gpu: Callable[..., None], plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'no.sock'}")
    assert host_checks.check_engine(plan).status == "ok", "none is needed without a GPU"
    gpu()
    found = host_checks.check_engine(plan)
    assert (found.status, "systemctl start docker" in found.seen) == ("warning", True)
    names = {c.name: c.status for c in doctor.machine_checks(plan.model_copy(update={"backend": "docker"}))}
    assert names["engine"] == "failed"


def test_the_hub(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in host_checks.check_hub(plan).seen
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        assert host_checks.check_hub(plan).status == "ok"
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        found = host_checks.check_hub(plan)
    assert (found.status, "HTTPS_PROXY" in found.fix) == ("warning", True)


def test_a_token_is_found_and_never_shown(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    path = tmp_path / "token"
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(path))
    assert "hf auth login" in host_checks.check_token(plan).seen
    path.write_text("hf_secret")
    path.chmod(0o644)
    found = host_checks.check_token(plan)
    assert (found.status, f"chmod 600 {path}") == ("warning", found.fix)
    path.chmod(0o600)
    assert host_checks.check_token(plan).status == "ok"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    found = host_checks.check_token(plan)
    assert "hf_" not in found.seen + found.fix


def test_a_gated_model_is_refused_before_the_download(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub import errors

    def gated(model: str) -> None:
        raise errors.GatedRepoError("no", response=httpx.Response(403, request=httpx.Request("GET", "http://x")))

    monkeypatch.setattr(doctor, "hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.auth_check", gated)
    check = next(c for c in doctor.run_checks(plan.model_copy(update={"model": "meta/gated"})) if c.name == "model")
    assert check.status == "failed"
    assert "hf auth login" in check.fix


def test_what_lies_in_the_way(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for check in (host_checks.check_specs, host_checks.check_shadowed, host_checks.check_leftovers):
        assert check(plan).status == "ok", check(plan)
    (tmp_path / "specs").write_text("")  # a file of that name is read by gcc too
    (tmp_path / "transformers").mkdir()
    assert "gcc" in host_checks.check_specs(plan).fix
    assert "transformers" in host_checks.check_shadowed(plan).seen
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert "/somewhere" in host_checks.check_shadowed(plan).seen


def test_leftovers_of_earlier_runs(plan: Plan) -> None:
    (plan.results / "old").mkdir(parents=True)
    (plan.results / "old" / "plan.yaml").write_text("")
    found = host_checks.check_leftovers(plan)
    assert (found.status, "resume old" in found.fix) == ("ok", True)
    (plan.output / "old").mkdir(parents=True)
    (plan.output / "old" / "model.safetensors.partial").write_bytes(b"x")
    found = host_checks.check_leftovers(plan)
    assert (found.status, "model.safetensors.partial" in found.seen) == ("warning", True)
