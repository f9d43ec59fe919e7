#!/usr/bin/env bash
# Runs the tests that depend on transformers' own models against another version of it, in an environment of its own.
# usage: scripts/test_matrix.sh VERSION
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/test_matrix.sh VERSION}
[[ $version =~ ^[0-9]+(\.[0-9]+)*$ ]] || { echo "test_matrix.sh: expected a version such as 5.17.0, got: $version" >&2; exit 2; }
venv=.venvs/matrix-$version
if [ ! -f "$venv/.done" ]; then
  rm -rf "$venv"
  cp -a .venvs/dev "$venv.partial"
  python=$(readlink -f .venvs/dev/bin/python)
  "$python" -m venv --upgrade "$venv.partial"
  "$venv.partial/bin/python" -m pip install -q "transformers==$version" "peft>=0.19"
  touch "$venv.partial/.done"
  mv "$venv.partial" "$venv"
fi
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest tests/training tests/kernels tests/setup/export tests/setup/data \
  tests/setup/test_demo.py -q -n "$(nproc)" --dist loadgroup
