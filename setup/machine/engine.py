"""The Docker engine: reached, or said in one sentence why not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from sparktune.setup.plan.errors import PreflightError

__all__ = [
    "ENGINE_GONE", "ENGINE_TIMEOUT_S", "INFINIBAND", "NoGPUs", "alive", "connect", "create_container",
    "network_for_downloads", "refuse_other_ids", "start_container",
]

ENGINE_GONE = "The Docker engine went away while a stage ran. Start it (sudo systemctl start docker) and resume."
INFINIBAND = "/dev/infiniband"
ENGINE_TIMEOUT_S = 60
_DEFAULT = "unix:///var/run/docker.sock"
_HERE = re.compile(r"unix://.|(tcp|https?)://(localhost|127\.[\d.]+|\[::1\])(:|/|$)")
_NO_GPUS = re.compile(r"could not select device driver|nvidia-container-cli|unresolvable CDI|runtime.*nvidia", re.I)


class NoGPUs(PreflightError):
    """An engine has no way to give a container its machine's GPUs."""


def connect() -> Any:
    """Returns a `docker.DockerClient` of the engine that DOCKER_HOST (or the default socket) names.

    Raises:
        PreflightError: no engine answers, this user may not use it, or it cannot serve this user.
    """
    # a quarter of a second to import, which only commands that use an engine pay
    from docker.client import DockerClient
    from docker.errors import DockerException

    address = os.environ.get("DOCKER_HOST") or _DEFAULT
    if not _HERE.match(address):
        raise PreflightError(
            f"DOCKER_HOST should name an engine of this machine, such as {_DEFAULT}; it is {address}. A container "
            "mounts folders of the machine that its engine runs on. Unset DOCKER_HOST, or start sparktune over there."
        )
    try:
        client = DockerClient.from_env(timeout=ENGINE_TIMEOUT_S)
        client.ping()
        refuse_other_ids(client, f"at {address}")
    except DockerException as error:
        text = str(error)
        if "permission denied" in text.lower():
            raise PreflightError(
                f"The Docker engine at {address} runs, but this user may not use it. Join its group: "
                "sudo usermod -aG docker $USER, then log in again."
            ) from error
        raise PreflightError(_silent(address, _reason(text))) from error
    except OSError as error:
        raise PreflightError(_silent(address, str(error))) from error
    return client


def refuse_other_ids(client: Any, where: str) -> None:
    """Refuses an engine whose containers write files as somebody else.

    Args:
        client: a `docker.DockerClient`.
        where: the engine's place, for the message.

    Raises:
        PreflightError: it is rootless, or maps users.
    """
    modes = {str(option).partition(",")[0] for option in client.info().get("SecurityOptions") or ()}
    if remapped := modes & {"name=rootless", "name=userns"}:
        raise PreflightError(
            f"The Docker engine {where} gives users other ids inside its containers "
            f"({remapped.pop().removeprefix('name=')}), so a run's files would not be yours. Use an engine that does "
            "not: sudo apt-get install docker.io, or --backend local."
        )


def create_container(client: Any, *, where: str = "", **options: Any) -> Any:
    """Returns a new container that is not started.

    Args:
        client: the engine.
        where: the machine of the engine; this one when left out.
        options: what `containers.create` of the SDK takes.

    Raises:
        PreflightError: the engine would not make it.
    """
    return _asked(lambda: client.containers.create(**options), "make", where)


def start_container(container: Any, *, where: str = "") -> None:
    """Starts a container. Only now does an engine look for the GPUs that it was asked for.

    Args:
        container: made and not started.
        where: the machine of its engine; this one when left out.

    Raises:
        NoGPUs: the engine cannot give it any.
        PreflightError: the engine would not start it.
    """
    _asked(container.start, "start", where)


def _asked(call: Callable[[], Any], word: str, where: str) -> Any:
    from docker.errors import APIError

    engine = f"The Docker engine of {where}" if where else "The Docker engine"
    try:
        return call()
    except APIError as error:
        why = str(error.explanation or error).strip()
        if _NO_GPUS.search(why):
            raise NoGPUs(
                f"{engine} has no way to give a container {'its' if where else 'this'} machine's GPUs ({why}). Install "
                f"NVIDIA's container toolkit{' over there' if where else ''} and tell the engine of it: sudo apt-get "
                "install nvidia-container-toolkit && sudo nvidia-ctk runtime configure --runtime=docker && sudo "
                "systemctl restart docker."
            ) from error
        raise PreflightError(f"{engine} would not {word} a container: {why}") from error
    except OSError as error:
        if where:  # `answering` says whose
            raise
        raise PreflightError(f"The Docker engine went away before it could {word} a container ({error}). Start it "
                             "(sudo systemctl start docker) and try again.") from error


def _silent(address: str, reason: str) -> str:
    return (f"No Docker engine answers at {address} ({reason}). Install it (sudo apt-get install docker.io) or start "
            "it (sudo systemctl start docker); or run without one: --backend local.")


def _reason(text: str) -> str:
    for word in ("No such file or directory", "Connection refused", "Connection aborted", "timed out"):
        if word.lower() in text.lower():
            return word.lower()
    return text.splitlines()[0][:200]


def alive(client: Any) -> bool:
    """Returns whether the engine still answers."""
    try:
        return bool(client.ping())
    except Exception:  # whatever a dying engine causes in the SDK means the same
        return False


def network_for_downloads(client: Any) -> str:
    """Returns the network of builds and containers that download: the engine's bridge, else the host's."""
    return "bridge" if client.networks.list(names=["bridge"]) else "host"
