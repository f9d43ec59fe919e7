#!/usr/bin/env bash
# Trains the MTP head of a merged model on a data set and attaches it: OUTPUT_DIR is the merged model with the new head.
#
#   mtp/train_mtp.sh MERGED_MODEL DATA.jsonl OUTPUT_DIR [train_mtp options, for instance --num-epochs 2]
#
# Defaults are the published ones: one pass, packs of 8,192 tokens (fewer where the data is small), lm_head_opt on.
# A second start goes on from the last checkpoint. Exit codes are those of train.py.
set -euo pipefail

if [ "$#" -lt 3 ]; then
    echo "usage: mtp/train_mtp.sh MERGED_MODEL DATA.jsonl OUTPUT_DIR [train_mtp options]" >&2
    exit 2
fi
model=$1 data=$2 out=$3
shift 3
if [ -e "$out" ]; then
    echo "$out exists already and is left as it is. Remove it or name another folder." >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

"$python" -P -m sparktune.mtp.train_mtp --model "$model" --data "$data" --out "$out.head.safetensors" "$@"
"$python" -P -m sparktune.mtp.inject_mtp --model "$model" --head "$out.head.safetensors" --out "$out"
