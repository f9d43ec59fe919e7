"""Network interfaces: which one leads to a machine, whether it is up, and how fast it says it is."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from sparktune.setup.plan.errors import PreflightError

__all__ = ["MEASURED", "Interface", "Route", "address_of", "interface_of", "interface_to", "routes"]

MEASURED = "sparktune-link: "
"""Begins the line in which training/linktest.py says what a link carries; the doctor looks for it."""
_UP = 0x1
_ROUTES = Path("/proc/net/route")
_INTERFACES = Path("/sys/class/net")


@dataclass(frozen=True, kw_only=True)
class Route:
    """A line of the kernel's table of routes; addresses as numbers."""

    interface: str
    to: int
    mask: int


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface."""

    name: str
    up: bool
    megabits: int | None
    """What the driver says of its speed; None where it says nothing (a virtual one, one that is down)."""


def routes(table: str) -> list[Route]:
    """Reads the text of /proc/net/route: the routes that are up."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and int(fields[3], 16) & _UP:
            # the kernel prints the bytes of the network's order as a number of this machine's order
            to, mask = (struct.unpack("!I", struct.pack("=I", int(fields[i], 16)))[0] for i in (1, 7))
            found.append(Route(interface=fields[0], to=to, mask=mask))
    return found


def address_of(host: str) -> str:
    """Returns the IPv4 address of a host's name.

    Raises:
        PreflightError: there is none.
    """
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise PreflightError(
            f"{host} should be the name or IPv4 address of a machine; it leads to none ({error}). Give its address on "
            "the link between the machines, such as 192.168.100.2."
        ) from error


def interface_to(address: str, table: str | None = None) -> str | None:
    """Returns the name of the interface that leads to an IPv4 address; None where nothing does.

    Args:
        address: of another machine, or an own one on a network that others are on.
        table: text of /proc/net/route; read when left out.
    """
    number = struct.unpack("!I", socket.inet_aton(address))[0]
    if number >> 24 == 127:
        return "lo"
    known = routes(_ROUTES.read_text(encoding="ascii") if table is None else table)
    fitting = [route for route in known if number & route.mask == route.to]
    return max(fitting, key=lambda route: route.mask).interface if fitting else None


def interface_of(name: str, folder: Path = _INTERFACES) -> Interface:
    """Looks at an interface.

    Args:
        name: of it.
        folder: /sys/class/net.
    """
    def read(what: str) -> str:
        try:
            return (folder / name / what).read_text(encoding="ascii").strip()
        except OSError:  # no speed while it is down
            return ""

    speed = read("speed")
    return Interface(
        name=name, up=read("operstate") in ("up", "unknown"),
        megabits=int(speed) if speed.isdigit() and 0 < int(speed) < 2**31 else None,
    )
