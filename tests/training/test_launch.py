"""The agent's settings on torch versions that know them all and on those that do not, and the interface between
machines."""

from __future__ import annotations

import dataclasses
import importlib
import socket

import pytest

from sparktune.setup.plan import links
from sparktune.setup.plan.errors import PreflightError
from sparktune.training import distributed, launch


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


ROUTES = (
    "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    "enp1s0\t0000000A\t00000000\t0001\t0\t0\t100\t000000FF\t0\t0\t0\n"  # 10.0.0.0/8
)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The addresses of names, to be filled; any other name leads nowhere."""
    known: dict[str, list[str]] = {}

    def getaddrinfo(host: str, *_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if host not in known:
            raise socket.gaierror(f"{host} is not known")
        return [(2, 1, 6, "", (address, 0)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(launch, "interface_to", lambda address: links.interface_to(address, ROUTES))
    return known


@pytest.mark.parametrize(("addresses", "interface"), [
    (["10.1.2.3"], "enp1s0"), (["127.0.1.1", "10.1.2.3"], "enp1s0"), (["127.0.1.1"], None), (["8.8.8.8"], None),
])
def test_a_machines_own_name_does_not_send_the_ranks_through_its_loopback(
    addresses: list[str], interface: str | None, names: dict[str, list[str]]
) -> None:
    names["node-1"], env = addresses, {"GLOO_SOCKET_IFNAME": "cable0"}
    if interface is None:
        with pytest.raises(PreflightError, match=r"node-1, where the machines should meet: .*Give its address"):
            launch.name_interfaces("node-1", env)
        assert env == {"GLOO_SOCKET_IFNAME": "cable0"}
    else:
        assert launch.name_interfaces("node-1", env) == interface
        assert env == {"GLOO_SOCKET_IFNAME": "cable0", "NCCL_SOCKET_IFNAME": interface}


def test_a_loopback_address_that_was_given_is_taken(names: dict[str, list[str]]) -> None:
    names["127.0.0.1"] = ["127.0.0.1"]
    assert launch.name_interfaces("127.0.0.1", {}) == "lo"


@pytest.mark.parametrize(("addresses", "set_before", "said"), [
    (["10.1.2.3"], {}, "Between the machines: GLOO_SOCKET_IFNAME=enp1s0, NCCL_SOCKET_IFNAME=enp1s0."),
    (["127.0.1.1"], {}, "Between the machines: gloo and NCCL choose an interface for want of a name. node-1, where"),
    (["127.0.1.1"], {"GLOO_SOCKET_IFNAME": "cable0"}, "Between the machines: GLOO_SOCKET_IFNAME=cable0, and the other"),
    (None, {"GLOO_SOCKET_IFNAME": "a", "NCCL_SOCKET_IFNAME": "b"},
     "Between the machines: GLOO_SOCKET_IFNAME=a, NCCL_SOCKET_IFNAME=b."),
])
def test_the_interface_between_the_machines_is_said(
    addresses: list[str] | None, set_before: dict[str, str], said: str, names: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, set_before.get(variable, ""))  # so that what is named here is taken back
        if variable not in set_before:
            monkeypatch.delenv(variable)
    if addresses is not None:
        names["node-1"] = addresses
    assert distributed._network("node-1").startswith(said)
