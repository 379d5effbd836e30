#!/usr/bin/env bash
# Trains and evaluates every run of every table of the paper: the rows of paper/runs.txt, with three seeds.
#
#   bash run_all.sh               sets up, gets the data, makes the tables' 144 runs, prints Tables 1-5
#   bash run_all.sh table3        the runs of one table: table1 ... table5
#   bash run_all.sh headline      Standard, AugMix and MAGNMA with ResNet-18 on CIFAR-10
#   bash run_all.sh nine          MAGNMA and mix-only with AugMix's nine operations, ResNet-18
#   bash run_all.sh demo          the headline's methods on scikit-learn's digits: ResNet-20, minutes on a CPU
#   bash run_all.sh list table3   only prints the commands of a part (default: all), one per line
#   bash run_all.sh data table3   only sets up and gets the data, for machines whose GPUs have no network
#   bash run_all.sh test          ruff, shellcheck and pytest
#
# Environment variables, e.g. SEEDS=0 GPUS=2 bash run_all.sh table3, and their defaults:
#   SEEDS="0 1 2"
#   GPUS=1         runs at a time, one GPU each; on a CPU they share the cores
#   ROOT=runs      folder of the runs, relative to this one
#   DEVICE=cuda    or cpu
#   FLAGS=         more flags for train.py; needs another ROOT
#   PYTHON=        an interpreter that has the packages; without it setup.sh makes .venv
# The demo's are SEEDS=0 GPUS=2 ROOT=runs-demo DEVICE=cpu.
#
# To stop it with its trainings: Ctrl-C, or the kill command that it prints. Run again, it resumes.
# SLURM: bash run_all.sh data table3, then in this folder an array of 27 jobs, --array=1-27, that run
#   bash run_all.sh list table3 | sed -n "${SLURM_ARRAY_TASK_ID}p" | bash

# shellcheck disable=SC2086 # unquoted variables are lists of words
set -euo pipefail

die() {
  echo "run_all.sh: $*" >&2
  exit 2
}

# Prints one line for each run of the part: its folder, a tab, its command. Seeds are the outer loop, so
# that every table is complete with one seed before the next seed starts.
commands() {
  local seed parts dataset arch name flags folder
  for seed in $SEEDS; do
    while read -r parts dataset arch name flags; do
      [[ $parts =~ $rows ]] || continue
      [[ $part != demo ]] || dataset=digits arch=resnet20
      [[ $name != *-* ]] || flags="--tag ${name#*-} $flags"
      folder=$ROOT/$dataset/$arch/$name/seed$seed
      printf '%s\t%q train.py' "$folder" "$python"
      printf ' %q' --dataset $dataset --arch $arch --method "${name%%-*}" $flags --seed $seed \
        --device $DEVICE $FLAGS --out "$folder" --resume
      printf ' && { [ -e %q ] || %q evaluate.py %q --device %q; }\n' \
        "$folder/results.json" "$python" "$folder" $DEVICE
    done <paper/runs.txt
  done
}

# Runs a line of `commands` on the GPU of xargs' slot. Prints the exit code and the folder.
# shellcheck disable=SC2329 # xargs calls it
run_one() {
  local folder=${1%%$'\t'*} code=0 cards
  IFS=, read -ra cards <<<"${CUDA_VISIBLE_DEVICES:-}"
  export CUDA_VISIBLE_DEVICES=${cards[SLOT]:-$SLOT}
  { mkdir -p "$folder" && eval "${1#*$'\t'}" >>"$folder/output.log" 2>&1; } || code=$?
  printf '%s\t%s\n' "$code" "$folder"
}

# Reads what run_one prints, for each run; at the end prints the tables, then the failed runs
report() {
  local count=0 code=0 failures="" status folder outcome number
  while IFS=$'\t' read -r status folder; do
    outcome=finished
    if ((status)); then
      outcome=failed code=1
      failures+="failed: $folder: $(tail -n 1 "$folder/output.log" 2>&1) (log: $folder/output.log)"$'\n'
    fi
    echo "[$((++count))/$total] $folder: $outcome"
  done
  for number in $tables; do "$python" tables.py "$ROOT" --table $number || code=1; done
  if [[ $part == demo ]]; then
    "$python" tables.py "$ROOT" || code=1
    "$python" figures.py "$ROOT" --dataset digits --arch resnet20 --out "$ROOT/figures" >/dev/null &&
      echo "Clean and corrupted accuracy: $ROOT/figures/figure5.png" || code=1
  fi
  printf %s "$failures"
  return $code
}

# All checks and tests, also after one has failed
run_tests() {
  local code=0 check
  PATH=$(dirname "$(command -v "$python")"):$PATH # where pip puts ruff and shellcheck
  for check in "ruff check ." "ruff format --check ." "shellcheck run_all.sh setup.sh .ci/run"; do
    if command -v "${check%% *}" >/dev/null; then
      $check || code=1
    else
      echo "run_all.sh: not installed, left out: $check"
    fi
  done
  OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist loadfile || code=1
  exit $code
}

((BASH_VERSINFO[0] >= 4)) && [[ $(xargs --version 2>/dev/null) == *GNU* ]] ||
  die "bash 4 and GNU xargs are needed, as on Linux. On macOS use the Python scripts"
[[ ${PYTHON:-} != [!/]*/* ]] || PYTHON=$PWD/$PYTHON # a path relative to the caller's folder
python=${PYTHON:-.venv/bin/python}
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

# The arguments. rows: a regular expression for the first column of runs.txt
mode=run
[[ ! ${1:-} =~ ^(list|data|test)$ ]] || { mode=$1 && shift; }
part=${1:-all}
case $part in
  -h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' run_all.sh && exit ;;
  all) rows='^[1-5]' tables="1 2 3 4 5" ;;
  table[1-5]) rows=${part#table} tables=${part#table} ;;
  headline) rows=headline tables="1 2" ;;
  nine) rows=nine tables="3 4" ;;
  demo) rows=headline tables="" ;;
  *) die "unknown part '$part'. The first lines of run_all.sh list the parts" ;;
esac
(($# <= 1)) && [[ $mode != test || $# == 0 ]] || die "too many words: '$*'. The first lines of run_all.sh show its use"
if [[ $part == demo ]]; then # 8 epochs of 44 batches: digits has 1,437 training images
  SEEDS=${SEEDS:-0} GPUS=${GPUS:-2} ROOT=${ROOT:-runs-demo} DEVICE=${DEVICE:-cpu}
  FLAGS="--epochs 8 --batch-size 32 --lr 0.02 --n 1 --eval-every 8 ${FLAGS:-}"
fi
SEEDS=${SEEDS:-0 1 2} GPUS=${GPUS:-1} ROOT=${ROOT:-runs} DEVICE=${DEVICE:-cuda} FLAGS=${FLAGS:-}

# Check everything before the first run
[[ $SEEDS =~ ^[0-9]+(\ +[0-9]+)*$ ]] || die "SEEDS takes numbers, e.g. SEEDS=\"0 1\", not '$SEEDS'"
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || die "GPUS takes a number, e.g. GPUS=2, not '$GPUS'"
[[ $DEVICE =~ ^(cuda|cpu)$ ]] || die "DEVICE is cuda or cpu, not '$DEVICE'"
for flag in $FLAGS; do
  [[ ! ${flag%%=*} =~ ^--(dataset|data|arch|method|tag|seed|device|out|resume)$ ]] ||
    die "FLAGS cannot have ${flag%%=*}: run_all.sh sets this flag itself"
done
[[ -z $FLAGS || $(realpath -m "$ROOT") != "$(realpath -m runs)" ]] ||
  die "FLAGS change the paper's recipe. Choose another folder than runs, e.g. ROOT=runs-quick"
[[ $mode != list ]] || { commands | cut -f 2-; exit; }
if [[ $mode == run && $DEVICE == cuda ]]; then
  visible=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)} || true
  gpus=$(tr , '\n' <<<"$visible" | grep -cE '^([0-9]|GPU-|MIG-)') || true
  ((gpus > 0)) || die "no NVIDIA GPU found. DEVICE=cpu trains on the CPU"
  ((GPUS <= gpus)) || die "GPUS=$GPUS is more than the $gpus that CUDA_VISIBLE_DEVICES or nvidia-smi shows"
fi
[[ $mode != run ]] || { mkdir -p "$ROOT" && [[ -w $ROOT ]]; } 2>/dev/null || die "cannot write to ROOT=$ROOT"

if [[ -z ${PYTHON:-} ]]; then
  bash setup.sh
else
  message=$("$python" train.py --help 2>&1 >/dev/null) ||
    die "PYTHON=$PYTHON lacks packages of requirements.txt (${message##*$'\n'}). Install them, or unset PYTHON"
fi
[[ $mode != test ]] || run_tests
lines=$(commands)
for dataset in digits cifar10 cifar100; do
  download=--download
  [[ $dataset != digits ]] || download=""
  [[ $lines != *" --dataset $dataset "* ]] || "$python" corruptions.py --dataset $dataset $download
done
[[ $mode != data ]] || exit 0

# The runs
cores=$(nproc)
[[ $DEVICE == cuda ]] || export OMP_NUM_THREADS=$((cores > GPUS ? cores / GPUS : 1))
total=$(wc -l <<<"$lines")
read -r _ _ _ _ group _ </proc/$$/stat
echo "run_all.sh: $total runs, $GPUS at a time, each with output.log in its folder." \
  "To stop: Ctrl-C, or kill -- -$group"
export -f run_one
# shellcheck disable=SC2016 # bash -c expands its $1
xargs -d '\n' -n 1 -P $GPUS --process-slot-var=SLOT bash -c 'run_one "$1"' bash <<<"$lines" | report || exit 1
