"""Benches, the lossless rig, negative results. Nothing imports lab.

`python -m lab....` from the repository's root puts the root on sys.path, where our folder `kernels` would shadow the
Hugging Face package of that name: the root is taken off again here, the one exception to "`__init__` does no work".
"""

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != _ROOT]
if str(_ROOT / "src") not in sys.path:
    sys.path.insert(0, str(_ROOT / "src"))
