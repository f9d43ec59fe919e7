#!/usr/bin/env bash
# From a chat JSONL to a fine-tuned, merged, exported model. Without arguments: the wizard.
# usage: ./run.sh [--demo | --non-interactive ... | doctor | analyze | plan | resume RUN | runs | evaluate RUN | chat RUN]
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

# The light environment asks, plans and shows; it has no torch. Runs on this machine itself need the other one.
demo=false flag='' file='' previous=''
for argument in "$@"; do
  case $argument in
    --demo) demo=true ;;
    --backend=*) flag=${argument#--backend=} ;;
    --config=*) previous=--config argument=${argument#--config=} ;;
  esac
  case $previous in
    --backend) flag=$argument ;;
    --config)
      if [ -r "$argument" ] && grep -Eq '^backend:[[:space:]]*["'\'']?local["'\'']?[[:space:]]*(#.*)?$' -- "$argument"; then
        file=local
      fi
      ;;
  esac
  previous=$argument
done
backend=${flag:-${SPARKTUNE_BACKEND:-$file}} environment=wizard
if [ "$backend" = local ] || { [ "$demo" = true ] && [ "$backend" != docker ]; }; then environment=local; fi

python=$("$root/scripts/venv.sh" "$environment") || exit $?
unset PYTHONHOME PYTHONPATH
# -P: the current folder stays off the module path, or a folder named kernels there would pose as the package.
exec "$python" -P -m sparktune.setup.cli "$@"
