#!/usr/bin/env bash
# Builds the image and tests it from inside; no questions asked.
# usage: ./install.sh [--stack NAME] [--baseline] [--rebuild[=clean]] [--max-jobs N] [--gates] [--uninstall] [--json] [--plain]
# exit: 0 all passed, 1 build or smoke test failed, 2 usage, 3 a host prerequisite is missing, 75 built but not tested on a GPU
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
python=$("$root/scripts/venv.sh" wizard) || exit $?
unset PYTHONHOME PYTHONPATH
exec "$python" -P -m sparktune.setup.install "$@"
