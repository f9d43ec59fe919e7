#!/usr/bin/env bash
# Runs a command inside the image, as you, with the standard mounts.
# usage: scripts/run.sh [--data FOLDER] [--image TAG] [--offline] [--two-machines INTERFACE] [--print] [--] COMMAND...
#   /data       FOLDER (default: the current folder), writable; the working directory
#   your Hugging Face cache, sparktune's caches and a home folder for compiled kernels stay between runs
#   --offline   no network at all       --two-machines   host network and InfiniBand; INTERFACE as ibdev2netdev says "Up"
# example: scripts/run.sh --data ~/my-data -- python /opt/sparktune/train.py --train-data /data/train.jsonl
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' -- "${BASH_SOURCE[0]}" >&2; exit 2; }
needs() { [ $# -gt 1 ] && [ -n "$2" ] || { echo "run.sh: $1 needs a value" >&2; usage; }; }

data=$PWD image=sparktune:2026.05-opt network=() interface='' print=false
while [ $# -gt 0 ]; do
  case $1 in
    --data) needs "$@"; data=$2; shift 2 ;;
    --image) needs "$@"; image=$2; shift 2 ;;
    --offline) network=(--network none); shift ;;
    --two-machines) needs "$@"; interface=$2; shift 2 ;;
    --print) print=true; shift ;;
    --) shift; break ;;
    -*) echo "run.sh: no such flag: $1" >&2; usage ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || usage
[ -d "$data" ] || { echo "run.sh: --data should be a folder; $data is none" >&2; exit 2; }
command -v docker >/dev/null || { echo "run.sh: docker is not installed (sudo apt-get install docker.io)" >&2; exit 3; }
if ! said=$(docker image inspect "$image" 2>&1 >/dev/null); then
  case $said in
    *[Nn]"o such image"*) echo "run.sh: the image $image is not here; make it with ./install.sh" >&2; exit 3 ;;
    *) echo "run.sh: the Docker engine does not answer (${said%%$'\n'*}); start it: sudo systemctl start docker" >&2
       exit 3 ;;
  esac
fi

data=$(cd -- "$data" && pwd -P)
[ -n "${HOME:-}" ] || { echo "run.sh: HOME should name your home folder; it is not set" >&2; exit 2; }
case ${XDG_CACHE_HOME:-} in
  /*) cache=$XDG_CACHE_HOME/sparktune ;;
  *) cache=$HOME/.cache/sparktune ;;  # as its specification says of a relative path
esac
hub=${HF_HOME:-$HOME/.cache/huggingface}
for path in "$data" "$cache" "$hub"; do
  case $path in
    *:*) echo "run.sh: Docker cannot mount a folder whose path holds a colon: $path" >&2; exit 2 ;;
  esac
done
# made here: what the engine makes itself belongs to root
mkdir -p "$cache/home" "$cache/tokens" "$cache/llama.cpp" "$hub"

flags=(--rm --ipc=host
       --user "$(id -u):$(id -g)" --label org.sparktune.run="$data" --name "sparktune-shell-$$" --workdir /data
       --cap-drop ALL --security-opt no-new-privileges
       --volume "$data:/data" --volume "$cache:/cache/sparktune" --volume "$hub:/cache/huggingface"
       --env HOME=/cache/sparktune/home --env USER=sparktune --env XDG_CACHE_HOME=/cache
       --env HF_HOME=/cache/huggingface --env TRITON_CACHE_DIR=/cache/sparktune/home/triton
       --env TORCHINDUCTOR_CACHE_DIR=/cache/sparktune/home/inductor)
if command -v docker-init >/dev/null; then flags+=(--init); fi  # a package of its own on some systems
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  flags+=(--gpus all --ulimit memlock=-1 --ulimit stack=67108864)  # pinned memory counts as locked
fi
# -t without a terminal on standard input fails ("the input device is not a TTY"), whatever standard output is
if [ -t 0 ]; then flags+=(--interactive --tty); fi
# the token by file: as a variable or an argument it would show in docker inspect and ps
token=${HF_TOKEN_PATH:-$hub/token}
if [ -f "$token" ]; then
  flags+=(--volume "$(cd -- "$(dirname -- "$token")" && pwd -P)/$(basename -- "$token"):/run/secrets/hub:ro"
          --env HF_TOKEN_PATH=/run/secrets/hub)
elif [ -n "${HF_TOKEN:-}" ]; then
  echo "run.sh: HF_TOKEN stays here (docker inspect would show it); put it into $hub/token, readable by you alone" >&2
fi
if [ -n "$interface" ]; then
  network=(--network host --device /dev/infiniband --env NCCL_SOCKET_IFNAME="$interface"
           --env GLOO_SOCKET_IFNAME="$interface")
fi

command=(docker run "${flags[@]}" ${network[@]+"${network[@]}"} "$image" "$@")
if [ "$print" = true ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
