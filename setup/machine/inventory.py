"""What a machine has that a run needs: files by their content, folders it may write to, memory, disk, an interface.

    python -m sparktune.setup.machine.inventory '{"files": [...], "written": [...], "towards": "192.168.100.1"}'

Run in a container of each machine, with the folders of a run mounted where they are; the answer is one line of JSON.
`finish` may name files that were sent: they get their names first. Below `clear`, what was sent and has no name
yet is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparktune.setup.machine.detect import existing_parent, host_memory_gib, nvidia_gpus
from sparktune.setup.plan.links import interface_of, interface_to

__all__ = ["MARK", "PARTIAL", "inventory", "known_files", "main"]

MARK = "sparktune-inventory: "
"""Begins the line of the answer."""
PARTIAL = ".sparktune-partial"
"""Ends the name of a file that is being sent."""
_WHOLE = 64 * 2**20
_SAMPLE = 2**20
_SAMPLES = 64


def _digest(path: Path, size: int) -> str:
    """Returns a sha256 over a file up to 64 MiB; of a larger one over its size and 64 pieces of 1 MiB, evenly spread.

    Two different bases of one size differ everywhere, so pieces tell them apart without reading tens of gigabytes.
    """
    if size <= _WHOLE:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def known_files(paths: Iterable[str]) -> dict[str, list[Any]]:
    """Returns path -> [size, digest] of every file at or below `paths`; a link is ["link", where it leads].

    A link that leads out of its folder counts as what it leads to, be it a file or a folder: a snapshot of the hub's
    cache is links to blobs beside it. What is not there has no entry, nor has what is still being sent.
    """
    found: dict[str, list[Any]] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            _note_folder(path, (), found)
        elif path.is_file():
            _note_file(path, found)
    return found


def _note_file(path: Path, found: dict[str, list[Any]]) -> None:
    size = path.stat().st_size
    found[str(path)] = [size, _digest(path, size)]


def _note_folder(root: Path, above: tuple[Path, ...], found: dict[str, list[Any]]) -> None:
    """Notes what lies at or below a folder; `above` are the folders whose links led here, none of which is entered."""
    real = root.resolve()
    for folder, folders, files in os.walk(root):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(folder) / name
            target = Path(os.path.realpath(path)) if path.is_symlink() else path
            if path.is_symlink() and target.is_relative_to(real) and _leads_there_too(path, root):
                found[str(path)] = ["link", os.readlink(path)]
            elif path.is_dir():
                if not any(entered.is_relative_to(target) for entered in (*above, real)):
                    _note_folder(path, (*above, real), found)
            elif path.is_file() and not name.endswith(PARTIAL):
                _note_file(path, found)


def _leads_there_too(link: Path, root: Path) -> bool:
    """Says whether a link leads to the same place where `root` lies at its path, but is no link to another."""
    leads = os.readlink(link)
    return not os.path.isabs(leads) or Path(leads).is_relative_to(root)


def _clear(paths: Iterable[str]) -> None:
    """Removes files that a start before this one began to send."""
    for text in paths:
        path = Path(text)
        left = [Path(text + PARTIAL)] if not path.is_dir() else list(path.rglob("*" + PARTIAL))
        for partial in left:
            with suppress(OSError):  # somebody else's folder: what is sent there is refused with its name
                partial.unlink()


def inventory(
    files: Iterable[str], written: Iterable[str], towards: str, given: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns what this machine has.

    Args:
        files: files and folders whose content counts.
        written: folders that a run writes to.
        towards: address of the machine whose link counts.
        given: folders that files may be sent to.

    Of `written` and `given`, `new` are empty and root's, as an engine makes them; `closed` are other people's.
    """
    folders = [Path(folder) for folder in written]
    refused = [str(p) for p in folders if not os.access(p, os.W_OK | os.X_OK)]
    mounts = {*given, *map(str, folders)}
    closed = dict.fromkeys(
        [*refused, *sorted(folder for folder in mounts if not os.access(folder, os.W_OK | os.X_OK))])
    new = [folder for folder in closed if os.stat(folder).st_uid == 0 and _holds_only(folder, mounts)]
    name = interface_to(towards)
    return {
        "files": known_files(files),
        "refused": refused,
        "new": new,
        "closed": [folder for folder in closed if folder not in new],
        "disk_gib": round(min((shutil.disk_usage(existing_parent(p)).free for p in folders), default=0) / 2**30, 2),
        "memory_gib": round(host_memory_gib(), 2),
        "interface": None if name is None else asdict(interface_of(name)),
        "gpus": [gpu for gpu, _, _ in nvidia_gpus()],
    }


def _holds_only(folder: str, mounts: set[str]) -> bool:
    """Says whether a folder is empty but for what an engine makes on the way to other mounts."""
    try:
        entries = [f"{folder.rstrip('/')}/{name}" for name in os.listdir(folder)]
    except OSError:
        return False
    return all(any(mount == entry or mount.startswith(f"{entry}/") for mount in mounts) for entry in entries)


def main() -> int:
    """Prints the inventory that the one argument asks for."""
    asked = json.loads(sys.argv[1])
    _clear(asked.get("clear", ()))
    unfinished = []
    for path in asked.get("finish", ()):
        if os.path.isfile(path + PARTIAL):  # not a link, which is sent as such
            try:
                os.replace(path + PARTIAL, path)
            except OSError:
                unfinished.append(path)
    found = inventory(asked["files"], asked["written"], asked["towards"], asked.get("given", ()))
    found["unfinished"] = unfinished
    print(MARK + json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
