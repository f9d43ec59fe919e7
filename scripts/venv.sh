#!/usr/bin/env bash
# Makes one of the project's Python environments from its lock file, once, and says where its Python is.
# usage: scripts/venv.sh wizard|local|dev [if-made]     (prints the interpreter's path on standard output)
#
# wizard: the journey's host side, no torch. local: training on this machine. dev: local and the tests' tools.
# if-made: makes nothing; exits 1 where there is no such environment.
# A stamp keyed by the lock file makes every later call a matter of milliseconds. An interrupted install is redone.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"

name=${1:-}
say() { printf '%s\n' "$*" >&2; }
case $name in
  wizard | local | dev) ;;
  *) say "venv.sh: expected one of wizard, local, dev; got '$name'."; exit 2 ;;
esac
venv=.venvs/$name
lock=requirements/$name.lock
[ -r "$lock" ] || { say "venv.sh: $lock is missing; the checkout is not complete. Run: git checkout -- requirements"; exit 3; }

# Which build of torch this machine takes: none, cpu (no CUDA packages), or cuda (what the index calls plain torch).
flavour=none
if [ "$name" != wizard ]; then
  flavour=cpu
  if [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidiactl ] || [ -e /dev/nvgpu ] || [ -e /dev/dxg ]; then
    flavour=cuda
  fi
  [ "$(uname -s)" = Linux ] || flavour=plain
fi
wanted=$( { printf 'recipe 2 %s %s\n' "$flavour" "$root"; cat -- "$lock" requirements/torch.txt; } | sha256sum)
ready() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$wanted" ]; }
done_already() { printf '%s\n' "$root/$venv/bin/python"; exit 0; }
if ready; then done_already; fi
[ "${2:-}" != if-made ] || exit 1
# The local environment holds everything of the wizard's: after a run on this machine there is nothing to install.
if [ "$name" = wizard ] && "$root/scripts/venv.sh" local if-made 2>/dev/null; then exit 0; fi

command -v flock >/dev/null || { say "venv.sh: the command flock is missing. Install it: sudo apt-get install util-linux"; exit 3; }
mkdir -p .venvs 2>/dev/null || { say "venv.sh: cannot make $root/.venvs. Make the folder writable."; exit 3; }
if ! [ -w .venvs ] || { [ -e .venvs/.lock ] && ! [ -w .venvs/.lock ]; }; then
  say "venv.sh: the $name environment has to be made, but $root/.venvs cannot be written by $(id -un)."
  say "Start once as the user that owns it, or make a checkout of your own."
  exit 3
fi
exec 9> .venvs/.lock
if ! flock -n 9; then
  say "Another start is installing an environment here; waiting for it."
  flock 9
fi
if ready; then done_already; fi   # the other start made this very one

find_python() {
  local candidate problem=
  for candidate in python3.13 python3.12 python3.11 python3; do
    command -v "$candidate" >/dev/null || continue
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
    problem=$candidate
  done
  if [ -n "$problem" ]; then
    say "$problem has no venv module. Install it: sudo apt-get install $("$problem" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  else
    say "sparktune needs Python 3.11 or newer; found $(python3 --version 2>&1 || true)."
    say "Install one: sudo apt-get install python3.11 python3.11-venv (or python3.12, python3.13)."
  fi
  return 3
}

log=.venvs/$name.log
: > "$log"
pip_pid=
trap '[ -z "$pip_pid" ] || kill "$pip_pid" 2>/dev/null || true
      say "Installation interrupted; the next start does it again."; exit 130' INT TERM

# Runs a command with its output in the log, and shows the time and the last line of it while it runs.
watched() {
  local what=$1 begin=$SECONDS shown=0 width line
  shift
  "$@" >> "$log" 2>&1 &   # keeps the lock too: a killed start leaves no pip that races the next one
  pip_pid=$!
  while kill -0 "$pip_pid" 2>/dev/null; do
    sleep 0.5
    if [ -t 2 ] && [ "${TERM:-dumb}" != dumb ]; then
      # a line that wraps cannot be wiped: each half second would leave one more on the screen
      width=$(stty size <&2 2>/dev/null | cut -d ' ' -f 2) || width=
      [ "${width:-0}" -gt 20 ] || width=80
      line="$name environment: $what, $((SECONDS - begin)) s  $(tail -n 1 -- "$log" | tr -d '\r')"
      printf '\r\033[K%s' "${line:0:width-1}" >&2
    elif [ $((SECONDS - begin)) -ge $((shown + 10)) ]; then
      shown=$((SECONDS - begin))
      say "$name environment: $what, $shown s"
    fi
  done
  [ ! -t 2 ] || [ "${TERM:-dumb}" = dumb ] || printf '\r\033[K' >&2
  wait "$pip_pid" || { pip_pid=; return 1; }
  pip_pid=
}

failed() {
  say "Making the $name environment failed while $1. The last lines of $root/$log:"
  tail -n 15 -- "$log" | sed 's/^/    /' >&2
  say "Check the network (or what pip is configured with) and the free disk space, then start again."
  exit 3
}

begin=$SECONDS
say "Making the $name environment in $venv (first start, or its lock file changed)."
unset PYTHONHOME PYTHONPATH
export PIP_USER=no PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
rm -f "$venv/.stamp"
if [ -e "$venv/.incomplete" ] || ! [ -x "$venv/bin/python" ]; then
  rm -rf -- "$venv"
fi
mkdir -p "$venv"
: > "$venv/.incomplete"
if ! [ -x "$venv/bin/python" ]; then
  python=$(find_python) || exit 3
  watched "creating it with $python" "$python" -m venv "$venv" || failed "creating it with $python"
fi
pip=("$venv/bin/python" -m pip)

# The lock is complete but for torch, which accelerate asks for: nothing is resolved here.
watched "installing locked packages" "${pip[@]}" install --no-deps --require-hashes -r "$lock" || failed "installing $lock"
torch=$(sed -n 's/^torch==\([0-9][0-9.]*\).*/\1/p' requirements/torch.txt)
case $flavour in
  none) ;;
  cpu)
    # What pip is configured with may hold the CPU build (a mirror, --find-links); PyTorch's own index always does, and
    # uv knows where that is. torch's needs are in the lock file: --no-deps keeps any CUDA package out.
    watched "installing torch $torch for CPU" "${pip[@]}" install --no-deps "torch==$torch+cpu" ||
      watched "installing torch $torch for CPU from PyTorch's index" \
        "$venv/bin/uv" pip install --no-deps --python "$venv/bin/python" --torch-backend cpu "torch==$torch" ||
      failed "installing torch $torch+cpu"
    ;;
  *) watched "installing torch $torch" "${pip[@]}" install -r requirements/torch.txt || failed "installing torch" ;;
esac
watched "installing sparktune" "${pip[@]}" install --no-deps -e . || failed "installing sparktune itself"
rm -f "$venv/.incomplete"
printf '%s\n' "$wanted" > "$venv/.stamp.partial"
mv "$venv/.stamp.partial" "$venv/.stamp"
say "Made the $name environment in $((SECONDS - begin)) s."
done_already
