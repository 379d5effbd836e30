#!/usr/bin/env bash
# Every run of every table of the paper, once each: 144 trainings, each followed by its evaluation.
#
#   bash run_all.sh                        Tables 1-5: sets up, fetches or makes the data, trains, evaluates
#   bash run_all.sh table3                 the runs of one table, table1 ... table5
#   bash run_all.sh demo                   Standard, AugMix and MAGNMA on scikit-learn's digits, minutes on a CPU
#   bash run_all.sh test [pytest flags]    ruff, shellcheck and the tests
#   bash run_all.sh list [table3]          one command a line, with its GPU-hours, and their sum
#   bash run_all.sh setup                  makes .venv with the packages of requirements.txt, no more
#   bash run_all.sh data                   that and the data, where the machines with GPUs have no network
#
#   --only K[,K...]           these lines of the list alone (for a SLURM array, GNU parallel, xargs)
#   --gpus 0,1                share the runs among these GPUs
#   --accumulate K            DenseNet-121 and Inception-V3 in K micro-batches, where GPUs have 16 GB (train.py --help)
#   --max-minutes M           pause each training after M minutes; the same command goes on
#   --download-corruptions    where data/ has no CIFAR-10-C or CIFAR-100-C, fetch the official one, not generate it
#   --scale quick             prove the orchestration on a CPU: digits, ResNet-20, 64 images, an epoch; in runs-quick/
#
# A run whose results.json is whole is skipped, an interrupted one resumes, a failed one does not stop the rest.
# PYTHON=/path/to/python uses that interpreter as it is and installs nothing.

set -euo pipefail
shopt -s nullglob
again=$(printf ' %q' bash "$0" "$@")
[[ ${PYTHON:-} == */* ]] && PYTHON=$(realpath -s "$PYTHON") # it may be relative to where the caller is
cd "$(dirname "${BASH_SOURCE[0]}")"

die() {
  echo "run_all.sh: $*" >&2
  exit 2
}

# The list of runs -----------------------------------------------------------------------------------------------------

# A line for each run: tables, dataset, arch, name of its folder, seed, cost (a method of `passes`), flags of train.py.
# Seed 0 comes first, so that every table is there once before any is there three times.
all_runs() {
  local seed dataset arch method three both lambda1 lambda2 sigma_max cost
  for seed in 0 1 2; do
    for dataset in cifar10 cifar100; do
      # Table 3 is CIFAR-10's, Table 4 CIFAR-100's; MAGNMA's columns of Table 3 are rows of Table 5
      three=3 both=35
      [[ $dataset == cifar100 ]] && three=4 both=4
      for method in at trades rse gn; do
        echo "$three $dataset resnet18 $method $seed $method --method $method"
      done
      for method in standard augmix; do
        echo "12$three $dataset resnet18 $method $seed $method --method $method"
      done
      echo "$both $dataset resnet18 magnma-noise $seed magnma_noise --method magnma --lambda2 0"
      echo "$both $dataset resnet18 magnma-mix $seed magnma_mix --method magnma --lambda1 0 --lambda2 5"
      echo "12$both $dataset resnet18 magnma $seed magnma --method magnma"
      for arch in densenet121 inceptionv3; do
        for method in standard augmix magnma; do
          echo "12 $dataset $arch $method $seed $method --method $method"
        done
      done
    done
    while read -r lambda1 lambda2 sigma_max; do
      cost=magnma
      [[ $lambda1 == 0 ]] && cost=magnma_mix
      [[ $lambda2 == 0 ]] && cost=magnma_noise
      echo "5 cifar10 resnet18 magnma-l1_$lambda1-l2_$lambda2-s_$sigma_max-b_1 $seed $cost --method magnma" \
        "--lambda1 $lambda1 --lambda2 $lambda2 --sigma-max $sigma_max"
    done < <(table5_rows)
  done
}

# lambda1, lambda2 and sigma_max of the other 18 rows of Table 5; beta is 1 in all of them
table5_rows() {
  printf '%s 0 0.2\n' 0.1 0.15 0.3 0.4 0.5
  echo 0.1 0 0.25
  printf '0 %s 0.2\n' 0.1 0.2 1 10
  printf '0.2 %s 0.2\n' 0.02 0.05 0.1 0.2 1 3 5 10
}

demo_runs() {
  echo "demo digits resnet20 magnma-n_1 0 magnma --method magnma"
  echo "demo digits resnet20 augmix 0 augmix --method augmix"
  echo "demo digits resnet20 standard 0 standard --method standard"
}

# The chosen lines of the list as commands, with tabs between: number, data set needed, folder, command to train,
# command to evaluate, and the run's key among the hours in results/benchmark-*.json
commands() {
  local k dataset arch name seed cost flags folder train evaluate needed
  for k in "${numbers[@]}"; do
    read -r _ dataset arch name seed cost flags <<<"${lines[k - 1]}"
    folder=$root/$dataset/$arch/$name/seed$seed needed=digits
    case $scale in
      full)
        needed=$dataset
        train="--dataset $dataset --arch $arch" evaluate=""
        [[ -z $accumulate || $arch == resnet18 ]] || train+=" --accumulate $accumulate"
        [[ -z $gpus ]] || train+=" --device cuda" evaluate="--device cuda" # where there is none, that is an error
        ;;
      quick)
        train="--dataset digits --arch resnet20 --stands-for $dataset/$arch --subset 64 --epochs 1 --device cpu"
        evaluate="--limit 4 --device cpu"
        ;;
      demo)
        train="--dataset digits --arch resnet20 --epochs 8 --batch-size 32 --lr 0.02 --n 1 --device cpu"
        evaluate="--only last --device cpu"
        ;;
    esac
    train="train.py --resume $train $flags --seed $seed --out $folder${max_minutes:+ --max-minutes $max_minutes}"
    evaluate="evaluate.py $folder${evaluate:+ $evaluate}"
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$k" "$needed" "$folder" "$train" "$evaluate" "$dataset/$arch/$cost"
  done
}

# GPU-hours -----------------------------------------------------------------------------------------------------------

# What benchmark.py found on a GPU, lines "dataset/arch/method hours file", and "arch/method timed" where it timed that
# training itself and did not infer its hours from others.
benchmark_hours() {
  local file
  for file in results/benchmark-cuda*.json; do
    sed -nE '/"hours": *\{/,/\}/ s|^ *"([a-z0-9]+/[a-z0-9]+/[a-z_]+)": *([0-9.]+),? *$|\1 \2 '"$file"'|p' "$file"
    sed -nE '/"timed": *\[/,/\]/ s|^ *"([a-z0-9]+/[a-z_]+)",? *$|\1 timed|p' "$file"
  done
}

# Each run's two commands on a line, its number and GPU-hours behind them as a comment; at the end the sum. Without a
# benchmark's hours they are estimated from the arithmetic of 150 epochs of 50,000 images.
print_list() {
  export python
  python=$(printf '%q' "${PYTHON:-.venv/bin/python}")
  { benchmark_hours && commands; } | awk -F '\t' '
    BEGIN {
      python = ENVIRON["python"]
      teraflops = 20 # assumed pace of a GPU in these networks
      # multiply-accumulates of an image forward, in 10^9
      macs["resnet18"] = 0.555; macs["densenet121"] = 0.888; macs["inceptionv3"] = 3.631
      # images forward and backward for each image of an epoch, with those for attacks, tests and RSE ensembles
      passes["standard"] = passes["gn"] = 1.1; passes["rse"] = 2.5; passes["augmix"] = 3.1
      passes["at"] = 8.1; passes["trades"] = 9.4
      passes["magnma_noise"] = passes["magnma_mix"] = 6.1; passes["magnma"] = 11.1
    }
    NF < 2 { split($0, entry, " "); hours[entry[1]] = entry[2]; file[entry[1]] = entry[3]; next }
    {
      printf "%s %s && %s %s  # %d", python, $4, python, $5, $1
      if ($2 == "digits") { print ": a stand-in, minutes on a CPU"; next }
      split($6, part, "/")
      if ($6 in hours) {
        h = hours[$6]; how = (part[2] "/" part[3] in hours ? "measured, " : "estimated, ") file[$6]
      } else { # a multiply-accumulate is 2 operations, and backward costs twice forward
        h = 150 * 50000 * passes[part[3]] * 3 * 2 * macs[part[2]] * 1e9 / (teraflops * 1e12) / 3600
        how = "estimated, at " teraflops " TFLOP/s"
      }
      sum[substr(how, 1, 1)] += h; count++
      printf ": %.2f GPU-hours, %s\n", h, how
    }
    END {
      if (count) {
        printf "# %d runs, %.0f GPU-hours: ", count, sum["m"] + sum["e"]
        printf "%.0f measured, %.0f estimated\n", sum["m"], sum["e"]
      }
    }'
}

# Setup ----------------------------------------------------------------------------------------------------------------

# Sets PYTHON: the interpreter given, or .venv's, with the packages of requirements.txt installed once.
setup() {
  if [[ -n ${PYTHON:-} ]]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is no program; name an interpreter, or unset it"
    return
  fi
  PYTHON=.venv/bin/python
  local wanted
  wanted=$(cksum <requirements.txt)
  [[ -f .venv/installed && $(<.venv/installed) == "$wanted" ]] && return
  if command -v flock >/dev/null; then # the jobs of an array may all start here: one installs, the others wait
    exec 9>.setup.lock
    flock 9
    if [[ -f .venv/installed && $(<.venv/installed) == "$wanted" ]]; then
      exec 9>&- # else the others would wait until this one's training ends
      return
    fi
  fi
  command -v python3 >/dev/null || die "no python3; install Python 3.11 or newer, or name one: PYTHON=/path/to/python"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$(python3 --version) is too old; install Python 3.11 or newer, or name one: PYTHON=/path/to/python"
  echo "run_all.sh: installing the packages of requirements.txt into .venv"
  python3 -m venv .venv || die "python3 -m venv failed, its message is above (on Debian: apt install python3-venv)"
  # imagecorruptions brings frost's photographs; nothing of it is imported, so it needs none of its dependencies
  local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check)
  if ! { "${pip[@]}" -r requirements.txt && "${pip[@]}" --no-deps imagecorruptions==1.1.2; }; then
    die "pip failed, its message is above; the same command tries again, PYTHON=/path/to/python uses what you have"
  fi
  echo "$wanted" >.venv/installed
  exec 9>&-
}

# The command line -----------------------------------------------------------------------------------------------------

part="all" listing="" scale="full" accumulate="" max_minutes="" gpus="" only=() flags=()
while (($#)); do
  case $1 in
    all | table[1-5] | demo | setup | data) part=$1 ;;
    list) listing=1 ;;
    test)
      part="test"
      shift
      break
      ;;
    --only)
      [[ ${2:-} =~ ^[0-9]{1,4}(,[0-9]{1,4})*$ ]] || die "--only takes lines of the list, as 3 or 1,2; not '${2:-}'"
      IFS=, read -ra only <<<"$2"
      shift
      ;;
    --gpus)
      [[ ${2:-} =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--gpus takes numbers with commas between, as 0,1; not '${2:-}'"
      gpus=$2
      shift
      ;;
    --accumulate)
      [[ ${2:-} =~ ^[1-9][0-9]{0,2}$ ]] || die "--accumulate takes a number of micro-batches, as 4; not '${2:-}'"
      accumulate=$2
      shift
      ;;
    --max-minutes)
      [[ ${2:-} =~ ^[0-9]+(\.[0-9]+)?$ && $2 =~ [1-9] ]] || die "--max-minutes takes a number above 0, not '${2:-}'"
      max_minutes=$2
      shift
      ;;
    --scale)
      [[ ${2:-} == @(quick|full) ]] || die "--scale is quick or full, not '${2:-}'"
      scale=$2
      shift
      ;;
    --download-corruptions) flags+=("$1") ;;
    -h | --help)
      sed -n '2,/^$/ s/^# \{0,1\}//p' run_all.sh
      exit
      ;;
    *) die "unknown part or flag '$1'; bash run_all.sh --help shows them" ;;
  esac
  shift
done

if [[ $part == @(setup|test) ]]; then
  setup
  [[ $part == setup ]] && exit
  PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
  if command -v ruff >/dev/null; then ruff check --quiet .; fi
  if command -v shellcheck >/dev/null; then shellcheck run_all.sh .ci/run; fi
  exec "$PYTHON" -m pytest "$@"
fi

[[ $part == demo ]] && scale=demo
case $scale in
  full) root=runs ;;
  quick) root=runs-quick flags+=(--preload) ;;
  demo) root=runs-demo ;;
esac
if [[ $scale != full ]]; then
  [[ -z $gpus ]] || die "--gpus is of no use here: the demo and --scale quick run on the CPU"
  gpus=","                 # two workers without a GPU;
  export OMP_NUM_THREADS=1 # with a thread each they do more than one with two
fi
[[ $part == data ]] && flags+=(--data-only)

if [[ $part == demo ]]; then mapfile -t lines < <(demo_runs); else mapfile -t lines < <(all_runs); fi
numbers=()
for k in "${!lines[@]}"; do
  [[ $part != table? || ${lines[k]%% *} == *"${part#table}"* ]] && numbers+=($((k + 1)))
done
if ((${#only[@]})); then
  [[ $part == @(all|data) ]] || die "--only counts the lines of the whole list; leave $part out"
  numbers=()
  for k in "${only[@]}"; do
    ((10#$k >= 1 && 10#$k <= ${#lines[@]})) || die "--only $k: the list has lines 1 to ${#lines[@]}"
    numbers+=($((10#$k)))
  done
fi

if [[ -n $listing ]]; then
  print_list
  exit
fi
setup
flags+=(--root "$root" --gpus "$gpus" --again "${again# }")
[[ $part == demo ]] && flags+=(-- tables.py "$root" --table 3 --dataset digits --arch resnet20 --checkpoint last)
exec "$PYTHON" run_list.py "${flags[@]}" < <(commands | cut -f 1-5)
