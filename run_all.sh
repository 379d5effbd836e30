#!/usr/bin/env bash
# Every run of every table of the paper, once each: 48 trainings a seed, each followed by its evaluation.
#
#   bash run_all.sh                  everything: sets up, gets the data, trains, evaluates, prints Tables 1-5
#   bash run_all.sh table3           the runs of one table, table1 ... table5
#   bash run_all.sh headline         Standard, AugMix and MAGNMA with ResNet-18 on CIFAR-10
#   bash run_all.sh demo             these three on scikit-learn's digits with ResNet-20, in minutes on a CPU
#   bash run_all.sh list [table3]    the commands, one a line: number, tab, command
#   bash run_all.sh data [table3]    sets up and gets the data, where the machines with GPUs have no network
#   bash run_all.sh setup            makes .venv with the packages of requirements.txt
#   bash run_all.sh test [-k ...]    ruff, shellcheck and pytest, with further flags for pytest
#
#   --seeds 0      these seeds alone; 0,1 for two; 0,1,2 by default
#   --gpus 2       so many runs at a time, each on a GPU of its own: GPUs 0, 1, ... or those of CUDA_VISIBLE_DEVICES
#   --only 7       line 7 alone of what `list` prints for the same arguments, and no table: for job arrays
#   --cpu          train on the CPU
#   --generate     make the corrupted CIFAR sets here (corruptions.py), where they are missing, not download them
#   --root DIR     the runs' folder, seen from this script's; by default runs, the demo's runs-demo
#   -- FLAGS       go to every train.py; then --root must name another folder than runs
#
# What is finished is skipped, what was killed goes on from its last epoch, what failed does not stop the rest: after
# Ctrl-C or a lost machine give the same command again. One of two machines that share this folder:
#   bash run_all.sh data && bash run_all.sh list | awk 'NR % 2 == 0' | cut -f 2 | bash
# PYTHON=/path/to/python before any of these uses that interpreter, and installs nothing.

set -euo pipefail
[[ ${PYTHON:-} == */* ]] && PYTHON=$(realpath -s "$PYTHON") # it may be relative to where the caller is
cd "$(dirname "${BASH_SOURCE[0]}")"

# The demo's training: digits has 1,437 images, so 8 epochs of 44 small batches; one sample a regulariser
demo=(--epochs 8 --batch-size 32 --lr 0.02 --n 1 --eval-every 8)

die() {
  echo "run_all.sh: $*" >&2
  exit 2
}

# All runs. Seeds are outermost, so that every table is there once before any is there three times.
list() {
  local number=0 wanted=${part#table} python=${PYTHON:-.venv/bin/python}
  local seed dataset table five headline method values arch l1 l2 sigma
  [[ $part == all ]] && wanted=""
  [[ $part == @(headline|demo) ]] && wanted=h
  for seed in $seeds; do
    for dataset in cifar10 cifar100; do # MAGNMA's columns of Table 3 are rows of Table 5
      [[ $dataset == cifar10 ]] && table=3 five=5 headline=h || table=4 five="" headline=""
      for method in standard augmix; do run "12$table$headline" $dataset resnet18 $method; done
      run "12$table$five$headline" $dataset resnet18 magnma
      for method in at trades rse gn; do run $table $dataset resnet18 $method; done
      run "$table$five" $dataset resnet18 magnma-noise --lambda2 0
      run "$table$five" $dataset resnet18 magnma-mix --lambda1 0 --lambda2 5
    done
    for values in {densenet121,inceptionv3}/{cifar10,cifar100}/{standard,augmix,magnma}; do
      IFS=/ read -r arch dataset method <<<"$values"
      run 12 "$dataset" "$arch" "$method" --recompute # with which MAGNMA's 11 passes fit into 16 GB
    done
    for values in 0.{1,15,3,4,5}/0/0.2 0.1/0/0.25 0/{0.1,0.2,1,10}/0.2 0.2/{0.02,0.05,0.1,0.2,1,3,5,10}/0.2; do
      IFS=/ read -r l1 l2 sigma <<<"$values"
      run 5 cifar10 resnet18 "magnma-l1_$l1-l2_$l2-s_$sigma-b_1" --lambda1 "$l1" --lambda2 "$l2" --sigma-max "$sigma"
    done
  done
}

# Prints a run's number, a tab and its command, if it was asked for. $1: a digit for each of its tables, h: the headline
run() {
  [[ $1 == *"$wanted"* ]] || return 0
  [[ $part == demo ]] && set -- h digits resnet20 "${@:4}"
  ((++number))
  [[ -z $only || $only == "$number" ]] || return 0
  local folder=$root/$2/$3/$4/seed$seed
  printf '%d\t%q train.py --resume' "$number" "$python"
  printf ' %q' --dataset "$2" --arch "$3" --method "${4%%-*}" "${@:5}" --seed "$seed" --device "$device" "${more[@]}" \
    --out "$folder"
  printf ' && %q evaluate.py %q --device %s\n' "$python" "$folder" "$device"
}

# Calls $2 ... while no other job does, by the lock file $1: the jobs of an array start together.
alone() {
  if command -v flock >/dev/null; then (flock 9 && "${@:2}") 9>"$1"; else ("${@:2}"); fi
}

# .venv with the packages of requirements.txt, once. V100s and older drivers get the last torch that was built for them.
install() {
  local stamp old="" except='^$'
  stamp="$(cksum <requirements.txt);"
  if old_gpu; then old=cu126 except='^torch(vision)?=='; fi
  [[ -f .venv/installed && $(<.venv/installed) == "$stamp$old"* ]] && return
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "no Python 3.11 or newer as python3; install one, or name it: PYTHON=/path/to/python"
  echo "run_all.sh: installing the packages of requirements.txt into .venv"
  [[ -x .venv/bin/python ]] || python3 -m venv .venv || die "python3 -m venv failed, its message is above"
  [[ -z $old ]] || pip torch==2.7.1 torchvision==0.22.1 --index-url https://download.pytorch.org/whl/cu126
  pip -r <(grep -vE "$except" requirements.txt)
  pip --no-deps imagecorruptions==1.1.2 # frost's photographs; nothing of it is imported
  echo "$stamp$old" >.venv/installed
}

pip() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" || die "pip failed, its message is above"
}

# Is there a GPU of compute capability below 7.5, or with a driver before 580? An old nvidia-smi cannot tell the former.
old_gpu() {
  local found
  found=$(nvidia-smi --query-gpu="driver_version,compute_cap" --format=csv,noheader 2>/dev/null ||
    nvidia-smi --query-gpu="driver_version" --format=csv,noheader 2>/dev/null) || return 1
  awk -F, '$1 + 0 < 580 && $2 + 0 >= 10 { exit 1 }' <<<"$found" ||
    die "a GPU of compute capability 10 or more needs an NVIDIA driver from 580 on here; update the driver"
  awk -F, '$1 + 0 < 580 || $2 + 0 < 7.5 { old = 1 } END { exit !old }' <<<"$found"
}

# Checks the runs on standard input, as `list` prints them, and the GPUs; gets the data of those that are not finished:
# what is under data/ is used, the rest is downloaded or made. Prints their folders and commands, with tabs between.
prepare() {
  "$PYTHON" -c '
import contextlib, shlex, sys
import torch
import corruptions, data, evaluate, train, utils

def finished(args):
    try:
        config, results = (utils.read_json(f"{args.out}/{name}.json") for name in ("config", "results"))
        evaluate.check_results(results)
        same = all(vars(args)[key] == "auto" for key in train.differing(vars(args), config))
        return same and results["best"] and results["last"] and results["limit"] is None
    except (OSError, ValueError, LookupError, TypeError):
        return False  # train.py --resume knows what to do

def main():
    mode, gpus, generate = sys.argv[1:]
    names = set()
    for line in sys.stdin:
        command = line.split("\t")[1]
        args = train.parse_args(shlex.split(command.split(" && ")[0])[2:])
        if mode == "data" or not finished(args):
            names.add(args.dataset)
            print(args.out, command, sep="\t", end="")
    if names and mode != "data" and torch.cuda.device_count() < int(gpus):
        raise ValueError(f"--gpus {gpus}: torch sees {torch.cuda.device_count()} GPUs here; --cpu trains without")
    for name in sorted(names):
        with contextlib.redirect_stdout(sys.stderr):
            folder = data.corrupted_folder(data.load_dataset(name, "data").name, "data")
            if not data.is_whole(folder):
                download = name in corruptions.OFFICIAL and not generate
                corruptions.main(["--dataset", name] + ["--download"] * download)

sys.argv[0] = "run_all.sh"
sys.exit(utils.run_main(main))' "$mode" "$([[ $device == cuda ]] && echo "$gpus" || echo 0)" "$generate"
}

# Runs a folder and its command, with a tab between, on the GPU of xargs' slot; prints exit code, seconds and folder
one_run() {
  local folder=${1%%$'\t'*} code=0 devices
  IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-}"
  export CUDA_VISIBLE_DEVICES=${devices[SLOT]:-$SLOT}
  { mkdir -p "$folder" && eval "${1#*$'\t'}" >>"$folder/output.log" 2>&1; } || code=$?
  printf '%s\t%s\t%s\n' "$code" "$SECONDS" "$folder"
}

hours() { echo "$(($1 / 3600)) h $(($1 / 60 % 60)) min"; }

# Reads what one_run prints for $1 of $2 runs; then prints the tables, then names what failed. Is all well?
report() {
  local done=0 well=1 failed=() code seconds folder outcome
  SECONDS=0
  while IFS=$'\t' read -r code seconds folder; do
    ((++done))
    ((code == 0)) && outcome=finished || outcome=failed failed+=("$folder")
    echo "[$(($2 - $1 + done))/$2] $folder: $outcome after $(hours "$seconds")," \
      "about $(hours $((SECONDS * ($1 - done) / done))) left"
  done
  [[ $only ]] || tables || well=0
  for folder in "${failed[@]}"; do
    echo "failed: $folder: $(tail -n 1 "$folder/output.log") (log: $folder/output.log)"
  done
  ((well && done == $1 && ${#failed[@]} == 0))
}

# The tables of what was run; the data set or network named after `--` takes the place of CIFAR-10 or ResNet-18.
tables() {
  local numbers=("${part#table}") places=() number well=1
  [[ " ${more[*]}" =~ " --arch"[\ =]([^\ ]+) ]] && places+=(--arch "${BASH_REMATCH[1]}")
  [[ " ${more[*]}" =~ " --dataset"[\ =]([^\ ]*/)?([^\ /]+) ]] && places+=(--dataset "${BASH_REMATCH[2]%.npz}")
  case $part in
    all) numbers=({1..5}) ;;
    headline) numbers=(1 2) ;;
    demo)
      "$PYTHON" figures.py "$root" --out "$root/figures" --dataset digits --arch resnet20 >/dev/null &&
        "$PYTHON" tables.py "$root" && echo "Clean and corrupted accuracy: $root/figures/figure5.png"
      return
      ;;
  esac
  for number in "${numbers[@]}"; do "$PYTHON" tables.py "$root" --table "$number" "${places[@]}" || well=0; done
  ((well))
}

# The data, then the runs, then the tables
work() {
  local lines left
  lines=$(list)
  mkdir -p data
  left=$(alone data/.lock prepare <<<"$lines")
  [[ $mode == data ]] && return
  set -- "$(grep -c . <<<"$left")" "$(wc -l <<<"$lines")"
  echo "run_all.sh: $2 runs, $1 to do, $gpus at a time; what each prints is in output.log in its folder"
  export -f one_run
  # shellcheck disable=SC2016
  printf %s "$left" | xargs -d '\n' -r -n 1 -P "$gpus" --process-slot-var=SLOT bash -c 'one_run "$1"' bash | report "$@"
}

# Ctrl-C and the like: ends all that works, and exits with code $1. Nothing is lost: a run's files appear whole.
stop() {
  trap '' INT TERM HUP
  [[ -z $child ]] || kill -TERM -- "-$child" || true
  wait
  echo "run_all.sh: stopped; the same command goes on" >&2
  exit "$1"
}

part="" mode="" seeds="" gpus="" only="" root="" device=cuda generate="" more=() child=""
while (($#)); do
  case $1 in
    all | table[1-5] | headline | demo)
      [[ -z $part ]] || die "one part at a time"
      part=$1
      ;;
    list | data | setup | test)
      [[ -z $mode ]] || die "one part at a time"
      mode=$1
      [[ $1 == test ]] && more=("${@:2}") && break
      ;;
    --seeds | --gpus | --only | --root)
      [[ ${2:-} == [!-]* ]] || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --cpu) device=cpu ;;
    --generate) generate=yes ;;
    --) more=("${@:2}") && break ;;
    -h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' run_all.sh && exit ;;
    *) die "unknown part or flag '$1'; bash run_all.sh --help shows them" ;;
  esac
  shift
done
for flag in "${more[@]}"; do
  [[ $mode == test || ${flag%%=*} != --@(method|seed|out|data|device) ]] || die "-- $flag: this flag it sets itself"
done
((${#more[@]} == 0)) || [[ $mode == test || $(realpath -m "${root:-runs}") != "$(realpath -m runs)" ]] ||
  die "with flags after -- the runs are not the paper's; name a folder for them, as --root runs-quick"
if [[ $part == demo ]]; then
  device=cpu more=("${demo[@]}" "${more[@]}") root=${root:-runs-demo} gpus=${gpus:-2} seeds=${seeds:-0}
fi
part=${part:-all} root=${root:-runs} gpus=${gpus:-1} seeds=${seeds:-0,1,2}
[[ $gpus =~ ^[1-9][0-9]?$ ]] || die "--gpus takes a number, as 2, not '$gpus'"
[[ $seeds =~ ^[0-9]{1,9}([ ,]+[0-9]{1,9})*$ ]] || die "--seeds takes numbers, as 0,1, not '$seeds'"
seeds=$(tr -s ' ,' '\n' <<<"$seeds" | sort -nu)
[[ -z $only || -n $(list) ]] || die "--only $only: the list has lines 1 to $(only="" && list | wc -l)"
[[ $mode != list ]] || { list && exit; }

trap 'stop 130' INT
trap 'stop 143' TERM HUP
if [[ -z ${PYTHON:-} ]]; then
  alone .setup.lock install
  PYTHON=.venv/bin/python
fi
command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is no program; name an interpreter, or unset it"
"$PYTHON" -c 'import importlib.util, sys; sys.exit(sys.version_info < (3, 11) or not importlib.util.find_spec("torch"))' ||
  die "PYTHON=$PYTHON is older than Python 3.11, or has no torch; unset PYTHON, or delete .venv/installed"
[[ $mode == setup ]] && exit
if [[ $mode == test ]]; then
  PATH=$(dirname "$(command -v "$PYTHON")"):$PATH # where pip has put them
  ruff check --quiet .
  shellcheck run_all.sh .ci/run
  export OMP_NUM_THREADS=1 # two at a time, where a second thread each would be in the way
  exec "$PYTHON" -m pytest -n 2 --dist loadfile "${more[@]}"
fi
# on a CPU the runs share the cores
[[ $device == cuda ]] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + gpus - 1) / gpus))}"
set -m # a process group of its own, so that a signal ends all of it
work </dev/null &
child=$!
set +m
wait "$child"
