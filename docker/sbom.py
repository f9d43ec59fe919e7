"""Prints what is installed in this environment as a CycloneDX 1.6 bill of materials."""

from __future__ import annotations

import importlib.metadata
import json
import sys


def component(distribution: importlib.metadata.Distribution) -> dict[str, object]:
    """Returns one package as a CycloneDX component."""
    meta = distribution.metadata
    name, version = meta["Name"], distribution.version
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
    found: dict[str, object] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    # only a declared SPDX expression is worth its field; older metadata holds whole licence texts there
    if expression := meta.get("License-Expression"):
        found["licenses"] = [{"expression": expression}]
    return found


def main() -> None:
    """Writes the document on standard output."""
    seen: dict[str, dict[str, object]] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.metadata["Name"]:
            seen.setdefault(distribution.metadata["Name"].lower().replace("_", "-"), component(distribution))
    document = {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {"component": {"type": "container", "name": "sparktune"}},
        "components": [seen[name] for name in sorted(seen)],
    }
    json.dump(document, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
