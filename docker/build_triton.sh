#!/usr/bin/env bash
# Builds Triton from one commit over the base's, for a chip that its bundled ptxas does not know yet.
# usage: build_triton.sh COMMIT      (40 hex digits; runs inside an image build)
set -euo pipefail
commit=${1:-}
if ! [[ $commit =~ ^[0-9a-f]{40}$ ]]; then
  echo "sparktune-check: TRITON_FROM_SOURCE should be a commit of 40 hex digits, not '$commit'" >&2
  exit 41
fi
git init --quiet /opt/triton
git -C /opt/triton fetch --quiet --depth 1 https://github.com/triton-lang/triton.git "$commit"
git -C /opt/triton checkout --quiet FETCH_HEAD
MAX_JOBS=${MAX_JOBS:-4} python -m pip install --no-deps --no-build-isolation /opt/triton
rm -rf /opt/triton
# triton itself may change here and nothing else
python - <<'PYTHON'
import importlib.metadata
import json
import pathlib

path = pathlib.Path("/opt/sparktune-build/base.json")
record = json.loads(path.read_text())
record["triton"] = importlib.metadata.version("triton")
path.write_text(json.dumps(record, indent=1, sort_keys=True))
PYTHON
python /opt/sparktune-build/verify_base.py check
