"""The Docker engine: reached, or said in one sentence why not."""

from __future__ import annotations

from typing import Any

from sparktune.setup.plan.errors import PreflightError

__all__ = ["ENGINE_TIMEOUT_S", "alive", "connect", "network_for_downloads"]

ENGINE_TIMEOUT_S = 60


def connect() -> Any:
    """Returns a `docker.DockerClient` of the engine that DOCKER_HOST (or the default socket) names.

    Raises:
        PreflightError: no engine answers, or this user may not use it.
    """
    # a quarter of a second to import, which only commands that use an engine pay
    from docker.client import DockerClient
    from docker.errors import DockerException

    try:
        client = DockerClient.from_env(timeout=ENGINE_TIMEOUT_S)
        client.ping()
    except DockerException as error:
        text = str(error)
        if "Permission denied" in text or "permission denied" in text:
            raise PreflightError(
                "The Docker engine runs, but this user may not use it. Join its group: "
                "sudo usermod -aG docker $USER, then log in again."
            ) from error
        raise PreflightError(
            f"No Docker engine answers ({_reason(text)}). Install it (sudo apt-get install docker.io) or start it "
            "(sudo systemctl start docker); or run without one: --backend local."
        ) from error
    except OSError as error:
        raise PreflightError(f"No Docker engine answers ({error}). Start it: sudo systemctl start docker.") from error
    return client


def _reason(text: str) -> str:
    for word in ("No such file or directory", "Connection refused", "Connection aborted", "timed out"):
        if word in text:
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
