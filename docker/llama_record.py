"""Writes build.json beside llama.cpp's programs: commit, options, compiler as cmake knew them, and each one's sha256.

usage: llama_record.py BUILD TARGET      (BUILD: cmake's folder; TARGET/bin holds the programs, TARGET gets the record)

The GGUF stage uses no program in an image whose record is of another commit or whose hash differs.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from pathlib import Path

ENTRY = re.compile(r"^([A-Za-z0-9_]+):[A-Z]+=(.*)$", re.M)
OPTIONS = ("GGML_", "LLAMA_", "BUILD_SHARED_LIBS", "CMAKE_BUILD_TYPE", "CMAKE_CUDA_ARCHITECTURES")


def main(build: str, target: str) -> None:
    """Reads cmake's cache and hashes the programs."""
    known = dict(ENTRY.findall((Path(build) / "CMakeCache.txt").read_text(encoding="utf-8")))
    record = {
        "commit": known["LLAMA_BUILD_COMMIT"],
        "options": {name: value for name, value in sorted(known.items()) if name.startswith(OPTIONS)},
        "compiler": known["CMAKE_CXX_COMPILER"],
        "machine": f"{platform.system()} {platform.machine()}",
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                   for path in sorted((Path(target) / "bin").iterdir())},
    }
    (Path(target) / "build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"llama.cpp {record['commit']}: {', '.join(record['sha256'])}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
