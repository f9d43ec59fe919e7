#!/usr/bin/env bash
# Resolves every stack's requirements.in into its requirements.lock: hashes, aarch64, Python 3.12, nothing of the base's.
# usage: docker/stacks/lock.sh [--check]      (needs uv and a package index; --check writes nothing and compares)
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}
check=${1:-}
# --only-binary: a package without a wheel for aarch64 fails here and not on the box
common=(pip compile --quiet --no-config --generate-hashes --no-header --no-annotate
        --no-emit-index-url --no-emit-find-links --no-emit-package numpy --no-emit-package setuptools
        --python-platform aarch64-manylinux_2_39 --python-version 3.12 --only-binary :all: --override overrides.txt)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for stack in 20*/; do
  stack=${stack%/}
  as_of=$(sed -n 's/^as_of: //p' "$stack/stack.yaml")
  folder=$stack
  if [ "$check" = --check ]; then
    # an existing output is what uv prefers, so that only what no longer resolves changes
    folder=$scratch
    cp "$stack"/{requirements,fast-path}.lock "$scratch"
  fi
  "$uv" "${common[@]}" --exclude-newer "$as_of" --constraint "$stack/constraints.txt" \
        "$stack/requirements.in" -o "$folder/requirements.lock" >/dev/null
  "$uv" "${common[@]}" --exclude-newer "$as_of" --no-deps "$stack/fast-path.in" -o "$folder/fast-path.lock" >/dev/null
  if [ "$check" = --check ]; then
    for file in requirements.lock fast-path.lock; do
      if ! diff -u "$stack/$file" "$folder/$file"; then
        echo "lock.sh: $stack/$file is out of date; run it without --check" >&2
        exit 1
      fi
    done
  fi
done
