"""docs/architecture.md's picture, held: which room may import which, and that the journey needs no torch to start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {"kernels", "setup.plan", "setup.data"}
ROOMS = ("kernels", "setup.plan", "setup.data", "setup.machine", "setup.export", "setup", "training", "mtp", "lab")
JOURNEY = GROUND | {"setup", "setup.machine", "setup.export"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "setup.plan": {"setup.plan"},
    "setup.data": {"setup.data", "setup.plan"},
    "setup.machine": {"setup.machine", "setup.plan", "setup.data"},
    # the stage entry of the MTP step lives in setup/export; all MTP logic is in mtp/
    "setup.export": {"setup.export", "setup.plan", "setup.data", "mtp"},
    "setup": JOURNEY,
    "training": GROUND | {"training"},
    "mtp": GROUND | {"training", "mtp"},
    "train.py": GROUND | {"training"},
    "lab": set(ROOMS),
}


def room_of(module: str) -> str:
    """Returns the room that `module` (without the `sparktune.` prefix) belongs to."""
    return next((room for room in ROOMS if module == room or module.startswith(room + ".")), module)


def imports_of(path: Path) -> set[str]:
    """Returns the sparktune modules that a file imports anywhere, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("sparktune.") for name in found if name.startswith("sparktune.")}


def sources() -> list[tuple[str, Path]]:
    """Returns (room, file) for every source file of the project."""
    files = [("train.py", ROOT / "train.py")]
    for top in ("kernels", "setup", "training", "mtp", "lab"):
        for path in sorted((ROOT / top).rglob("*.py")):
            dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            files.append((room_of(dotted), path))
    return files


def wrong_arrows(room: str, path: Path) -> list[str]:
    """Returns the imports of `path` that its room must not have."""
    return [name for name in imports_of(path) if room_of(name) in ROOMS and room_of(name) not in MAY_IMPORT[room]]


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows_run_one_way(room: str) -> None:
    wrong = [f"{path.relative_to(ROOT)} imports {name}" for r, path in sources() if r == room
             for name in wrong_arrows(r, path)]
    assert not wrong, "\n".join(wrong)


def test_the_arrow_check_sees_a_wrong_arrow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from sparktune.training import loop\n    return loop\n")
    assert wrong_arrows("kernels", bad) == ["training.loop"]


def test_setup_needs_no_torch_to_import() -> None:
    modules = [
        "sparktune." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for _, path in sources()
        if path.relative_to(ROOT).parts[0] == "setup"
    ]
    code = (
        "import importlib, sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ImportError('torch imported at import time')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        f"for m in {modules!r}: importlib.import_module(m)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_source_file_outgrows_its_room() -> None:
    long = {str(p.relative_to(ROOT)): n for _, p in sources() if (n := len(p.read_text().splitlines())) > 600}
    assert not long, f"longer than 600 lines: {long}"
