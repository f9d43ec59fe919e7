#!/usr/bin/env bash
# From a chat JSONL to a fine-tuned, merged, exported model. Without arguments: the wizard.
# usage: ./run.sh [--demo | --non-interactive ... | doctor | analyze | plan | resume RUN | runs | evaluate RUN | chat RUN]
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

# The light environment asks, plans and shows; it has no torch. Runs on this machine itself need the other one.
environment=wizard
[ "${SPARKTUNE_BACKEND:-}" != local ] || environment=local
previous=
for argument in "$@"; do
  case $argument in
    --demo | --backend=local) environment=local ;;
    --backend=*) environment=wizard ;;
    --config=*) previous=--config argument=${argument#--config=} ;;
  esac
  case $previous in
    --backend) if [ "$argument" = local ]; then environment=local; else environment=wizard; fi ;;
    --config)
      if [ -r "$argument" ] && grep -Eq '^backend:[[:space:]]*["'\'']?local["'\'']?[[:space:]]*(#.*)?$' -- "$argument"; then
        environment=local
      fi
      ;;
  esac
  previous=$argument
done

python=$("$root/scripts/venv.sh" "$environment") || exit $?
unset PYTHONHOME PYTHONPATH
# -P: the current folder stays off the module path, or a folder named kernels there would pose as the package.
exec "$python" -P -m sparktune.setup.cli "$@"
