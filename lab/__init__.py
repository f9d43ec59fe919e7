"""Benches, the lossless rig, negative results. Nothing imports lab.

`python -m lab....` works from the repository's root without an installation: the package is found in `src`, and
importing it takes the root off sys.path again (see sparktune's own docstring).
"""

import sys
from importlib import import_module
from pathlib import Path

_SOURCE = str(Path(__file__).resolve().parents[1] / "src")
if _SOURCE not in sys.path:
    sys.path.insert(0, _SOURCE)
import_module("sparktune")
