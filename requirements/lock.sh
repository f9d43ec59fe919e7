#!/usr/bin/env bash
# Resolves pyproject.toml into hash-locked files, one an environment. torch and its CUDA wheels stay out
# (requirements/torch.txt says why); what torch itself needs is in.
# usage: requirements/lock.sh      (needs uv and a package index)
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-uv}
common=(--universal --python-version 3.11 --no-emit-index-url --no-emit-find-links --no-header --no-annotate
        --generate-hashes --quiet --constraint requirements/pins.txt)
excludes=$(mktemp); trap 'rm -f "$excludes"' EXIT
echo torch > "$excludes"
"$uv" pip compile "${common[@]}" pyproject.toml --extra wizard -o requirements/wizard.lock
"$uv" pip compile "${common[@]}" --excludes "$excludes" pyproject.toml requirements/torch-needs.in \
      --extra wizard --extra train -o requirements/local.lock
"$uv" pip compile "${common[@]}" --excludes "$excludes" pyproject.toml requirements/torch-needs.in \
      --extra wizard --extra train --extra dev -o requirements/dev.lock
