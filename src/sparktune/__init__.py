"""sparktune: from a chat JSONL to a fine-tuned, merged, exported Qwen3.5 on a desk-side box.

The rooms are folders at the top of the repository (`setup/`, `training/`, `kernels/`, `mtp/`, `lab/`) that are
linked in here. A checkout's root on sys.path (a script started there, `python -m` from there) would let its folder
`kernels` pose as the Hugging Face package of that name, which transformers looks for: it is taken off again here, once
for every entry point, the one exception to "`__init__` does no work".
"""

import os
import sys

__all__ = ["__version__"]

__version__ = "0.1.0"

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
if os.path.isdir(os.path.join(_ROOT, "kernels")):
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != _ROOT]
