#!/usr/bin/env bash
# Every claim that waits for a real GB10, in one command and one CSV: what ran, how it ended, and its last line.
# usage: lab/gb10_first_hour.sh [--list] [OUTPUT_FOLDER]          (default: results/gb10-first-hour)
# PYTHON names the interpreter of the training environment (default: python3). Exit: 0 all green, 1 something red, 3 no GPU.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
python=${PYTHON:-python3}

only_list=
if [ "${1:-}" = --list ]; then
  only_list=yes
  shift
fi
out=${1:-results/gb10-first-hour}
case $out in /*) ;; *) out=$PWD/$out ;; esac
table=$out/first_hour.csv
red=0

# A CSV field: quotes doubled, line ends gone.
field() {
  local text=${1//$'\n'/ }
  printf '"%s"' "${text//\"/\"\"}"
}

# claim NAME WHAT LIMIT_S COMMAND...: runs the command under a time limit and writes one row.
claim() {
  local name=$1 what=$2 limit_s=$3 started code=0 last
  shift 3
  if [ -n "$only_list" ]; then
    printf '%-22s %5s s  %s\n    %s\n' "$name" "$limit_s" "$what" "$*"
    return
  fi
  printf '%s: %s\n' "$name" "$what"
  started=$SECONDS
  timeout --kill-after=20 "$limit_s" "$@" >"$out/$name.log" 2>&1 || code=$?
  last=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c 1-400) || last='(no output)'
  {
    field "$name"; printf ','
    field "$what"; printf ','
    field "$*"; printf ',%s,%s,' "$code" "$((SECONDS - started))"
    field "$last"; printf ','
    field "$gpu"; printf ','
    field "$commit"; printf '\n'
  } >>"$table"
  if [ "$code" -eq 0 ]; then
    printf '  green, %s s: %s\n' "$((SECONDS - started))" "$last"
  else
    red=$((red + 1))
    printf '  RED, exit %s after %s s: %s (log: %s)\n' "$code" "$((SECONDS - started))" "$last" "$out/$name.log"
  fi
}

if [ -z "$only_list" ]; then
  if ! gpu=$(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader 2>/dev/null) || [ -z "$gpu" ]; then
    echo "The first hour needs a GB10, but nvidia-smi shows no GPU here. Run this on the DGX Spark." >&2
    exit 3
  fi
  case $gpu in
    *GB10* | *"12.1"*) ;;
    *) echo "Note: this GPU is '$gpu', not a GB10; the rows say so and settle no claim about one." >&2 ;;
  esac
  commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
  mkdir -p "$out"
  [ -e "$table" ] || echo 'claim,what,command,exit,seconds,last_line,gpu,commit' >"$table"
  printf 'GPU: %s; commit %s; rows go to %s\n' "$gpu" "$commit" "$table"
fi

claim machine 'what the machine and its versions are' 60 \
  "$python" -c 'import platform, torch, triton; print(platform.platform(), "torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
claim kernels-compile 'every own kernel compiles for sm_121a within 101,376 bytes of shared memory' 600 \
  "$python" -m lab.sm121a_table 2B
claim kernels-right 'every fused op is right on the chip, then its time and bytes a second' 900 \
  "$python" -m lab.gpu_check --seeds 3 --out "$out/kernels.csv"
claim mixers-right 'attention and delta rule are right on the chip, then their times' 600 \
  "$python" -m lab.gpu_check_mixers --seeds 3 --out "$out/mixers.csv"
claim matmul 'our product and the single-launch LoRA product beside cuBLAS, shape by shape' 600 \
  "$python" -m lab.bench_matmul --csv "$out/matmul.csv"
claim memory 'predicted against measured peak within +7 % and -3 %' 600 \
  "$python" -m lab.memory_sweep --small --csv "$out/memory_sweep.csv"
claim lossless 'ours is no further from float32 than plain bf16 is' 600 \
  "$python" -m lab.lossless --size 0.8B --steps 10 --csv "$out/lossless.csv"
claim native 'tokens a second of the native engine, 2B, rank 128, 5376 tokens' 600 \
  "$python" -m lab.side_by_side native --recompute norms --csv "$out/side_by_side.csv"
claim native-packed 'the same on long-tailed documents packed without leaks, per real token' 600 \
  "$python" -m lab.side_by_side native --recompute norms --long-tailed 24 --csv "$out/side_by_side.csv"
claim unsloth 'the same of Unsloth with its checkpointing' 900 \
  "$python" -m lab.side_by_side unsloth --csv "$out/side_by_side.csv"
claim unsloth-nogc 'Unsloth without checkpointing, and on the long-tailed documents, one by one and leaking' 1800 \
  "$python" -m lab.side_by_side unsloth_nogc+unsloth_nogc_leaky --lengths 5376 --long-tailed 24 --csv "$out/side_by_side.csv"
claim profile 'GPU-busy time, launches and bytes a token of the native engine' 600 \
  "$python" -m lab.profile native --recompute norms --csv "$out/profile.csv"
claim dram 'the same bytes from the DRAM counters, where ncu may read them' 900 \
  "$python" -m lab.dram native --accum 1 --recompute norms --csv "$out/profile.csv"
claim bench-lora 'the verification bench, LoRA' 900 \
  "$python" -m lab.training_loop.qwen_minimal_bench --mode lora --steps 3 --csv "$out/qwen_minimal_bench.csv"
claim bench-full 'the verification bench, full fine-tuning' 900 \
  "$python" -m lab.training_loop.qwen_minimal_bench --mode full-bf16 --steps 3 --csv "$out/qwen_minimal_bench.csv"
claim demo 'the whole journey on the demo model' 900 \
  ./run.sh --demo --plain

[ -z "$only_list" ] || exit 0
if [ "$red" -gt 0 ]; then
  echo "$red claims are red; see $table"
  exit 1
fi
echo "all claims are green; see $table"
