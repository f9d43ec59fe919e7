#!/usr/bin/env bash
# From a chat JSONL to a fine-tuned, merged, exported model. Without arguments: the wizard.
# usage: ./run.sh [--demo | --non-interactive ... | doctor | analyze | plan | resume RUN | runs | evaluate RUN | chat RUN]
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

# The light environment asks, plans and shows; it has no torch. Runs on this machine itself need the other one.
demo=false peers=false flag='' file='' previous=''
for argument in "$@"; do
  case $argument in
    --demo) demo=true ;;
    --backend=*) flag=${argument#--backend=} ;;
    --peers | --peers=*) peers=true ;;
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
# other machines train in containers, the demo's too
if [ "$demo" = true ] && [ "$backend" != docker ] && [ "$peers" = false ]; then environment=local; fi
if [ "$backend" = local ]; then environment=local; fi

python=$("$root/scripts/venv.sh" "$environment") || exit $?
unset PYTHONHOME PYTHONPATH
# -P: the current folder stays off the module path, or a folder named kernels there would pose as the package.
exec "$python" -P -m sparktune.setup.cli "$@"
