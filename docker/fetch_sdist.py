"""Downloads one source distribution by its lock line and unpacks one submodule of it, running nothing of it.

usage: fetch_sdist.py LOCK FOLDER_INSIDE TARGET

`pip download` would start the sdist's build backend to ask for metadata, with build tools that no lock names.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tarfile
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

from pip._internal.models.index import PyPI  # where this image's pip looks when nobody configured it

LINE = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)\s+--hash=sha256:([0-9a-f]{64})\s*$", re.M)
COMMIT = re.compile(r"^# commit: ([0-9a-f]{40})$", re.M)


def main(lock: str, inside: str, target: str) -> int:
    """Fetches, verifies and unpacks; returns the exit code."""
    found = LINE.search(Path(lock).read_text(encoding="utf-8"))
    if found is None:
        print(f"sparktune-check: {lock} should hold one line NAME==VERSION --hash=sha256:...")
        return 41
    name, version, wanted = found.groups()
    commit = COMMIT.search(Path(lock).read_text(encoding="utf-8"))
    index = os.environ.get("PIP_INDEX_URL", PyPI.simple_url).rstrip("/") + f"/{name}/"
    # https alone: this opener knows no file: and no http:
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPSHandler(), urllib.request.HTTPErrorProcessor(),
                    urllib.request.HTTPRedirectHandler(), urllib.request.HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    with opener.open(index, timeout=120) as answer:
        page, base = answer.read().decode(), answer.geturl()
    file_name = f"{name.replace('-', '_')}-{version}.tar.gz"
    link = re.search(rf'href="([^"#]*{re.escape(file_name)})', page)
    if link is None:
        print(f"sparktune-check: {index} does not offer {file_name}")
        return 41
    with opener.open(urljoin(base, link[1]), timeout=600) as answer:
        data = answer.read()
    seen = hashlib.sha256(data).hexdigest()
    if seen != wanted:
        print(f"sparktune-check: {file_name} has sha256 {seen}, {lock} says {wanted}. Do not use it.")
        return 41
    top, inside = f"{name.replace('-', '_')}-{version}", inside.strip("/")
    prefix, head = f"{top}/{inside}/", f"{top}/.git/modules/{inside}/HEAD"  # the submodule's own commit
    count, carried = 0, "none"
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for member in archive:
            if member.name == head and (file := archive.extractfile(member)) is not None:
                carried = file.read().decode("ascii", "replace").strip()
            if not member.isfile() or not member.name.startswith(prefix):
                continue
            path = Path(target) / member.name.removeprefix(prefix)
            if ".." in path.parts:
                print(f"sparktune-check: {file_name} holds a path that leaves its folder: {member.name}")
                return 41
            path.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None  # a regular file has content
            path.write_bytes(content.read())
            path.chmod(member.mode & 0o755)
            count += 1
    if commit is not None and carried != commit[1]:
        print(f"sparktune-check: {file_name} carries {inside} at {carried}, {lock} says {commit[1]}. Do not use it.")
        return 41
    print(f"{file_name}: sha256 verified, {count} files of {inside} at {carried} in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
