"""Turns a Debian with a CPU torch into what NVIDIA's image looks like to pip: versions, metadata, a stub compiler."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path

TORCH = "2.11.0a0+stub"
POSED = {"triton": "3.6.0", "torchvision": "0.26.0a0+stub", "torchao": "0.16.0+stub", "xformers": "0.0.33+stub"}

EXTENSION = '''
"""Stub of torch.utils.cpp_extension: extensions are declared and not compiled."""
from setuptools.command.build_ext import build_ext
from setuptools import Extension

CUDA_HOME = "/usr/local/cuda"
HIP_HOME = None


def CUDAExtension(name, sources, **_):
    return Extension(name, sources)


CppExtension = CUDAExtension


class BuildExtension(build_ext):
    def build_extensions(self):
        print("stub: not compiling", [e.name for e in self.extensions])

    def get_outputs(self):
        return []

    def copy_extensions_to_source(self):
        return None
'''


def main() -> None:
    """Rewrites torch's version, and writes the metadata of the packages that only pose."""
    metadata = Path(str(importlib.metadata.distribution("torch").locate_file("")))
    old = next(metadata.glob("torch-*.dist-info"))
    text = (old / "METADATA").read_text(encoding="utf-8")
    # the real base's torch declares no wheels of CUDA libraries; a CPU build's needs are in the stub or in the lock
    kept = [line for line in text.splitlines() if not line.startswith("Requires-Dist: ")]
    (old / "METADATA").write_text(
        re.sub(r"^Version: .*$", f"Version: {TORCH}", "\n".join(kept), flags=re.M), encoding="utf-8"
    )
    shutil.move(str(old), str(metadata / f"torch-{TORCH}.dist-info"))  # another layer: a rename would cross devices
    version = metadata / "torch" / "version.py"
    version.write_text(re.sub(r"^__version__ = .*$", f"__version__ = '{TORCH}'", version.read_text(), flags=re.M))
    (metadata / "torch" / "utils" / "cpp_extension.py").write_text(EXTENSION, encoding="utf-8")
    for name, number in POSED.items():
        folder = metadata / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")
        (folder / "RECORD").write_text("", encoding="utf-8")


if __name__ == "__main__":
    main()
