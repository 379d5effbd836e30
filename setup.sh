#!/usr/bin/env bash
# Makes .venv with the packages of requirements.txt. Does nothing if they are installed already.
#
#   bash setup.sh          on GPUs that need it (V100s, older drivers): torch's build for CUDA 12.6
#   bash setup.sh cu126    that build in any case, e.g. on a cluster's login node without a GPU
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")"

die() {
  echo "setup.sh: $*" >&2
  exit 2
}

pip() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" || die "pip failed, see its message above"
}

build=${1:-}
[[ $# -le 1 && $build =~ ^(cu126)?$ ]] || die "unknown argument. Usage: bash setup.sh [cu126]"

# Lines like "535.104.05, 7.0". The nvidia-smi of drivers before 510 does not know compute_cap.
gpus=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null) ||
  gpus=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || gpus=""
refused=$(awk -F, '/^[0-9]/ && ($1 + 0 < 525 || $1 + 0 < 580 && $2 + 0 >= 10)' <<<"$gpus")
[[ -z $refused ]] || die "the NVIDIA driver is too old: ${refused%%$'\n'*} (version, compute capability). Update it to 580"
[[ -z $(awk -F, '/^[0-9]/ && ($1 + 0 < 580 || $2 + 0 < 7.5)' <<<"$gpus") ]] || build=cu126

stamp="$(cksum <requirements.txt) $PWD $build" # where cu126 is not needed, a .venv with it is accepted too
[[ ! -x .venv/bin/python || ! -f .venv/installed || $(<.venv/installed) != "$stamp"* ]] || exit 0

for python in python3 python3.13 python3.12 python3.11 ""; do # "": none of them
  [[ ! $("$python" --version 2>/dev/null) =~ ^Python\ 3\.(1[1-9]|[2-9][0-9]) ]] || break
done
[[ $python ]] || die "Python 3.11 or newer not found as python3. Install it, or set PYTHON for run_all.sh"
echo "setup.sh: installing the packages of requirements.txt into .venv; some minutes"
clear="" # a moved .venv still has its old path in its scripts, so it is made again
[[ ! -f .venv/bin/activate ]] || grep -qF "$PWD/.venv" .venv/bin/activate || clear=--clear
[[ ! $clear && -x .venv/bin/python && -x .venv/bin/pip ]] || "$python" -m venv ${clear:+"$clear"} .venv ||
  die "python3 -m venv failed, see above"
if [[ $build == cu126 ]]; then
  pip --extra-index-url https://download.pytorch.org/whl/cu126 \
    -r <(sed -E 's/^(torch|torchvision)==[0-9.]+/&+cu126/' requirements.txt)
else
  pip -r requirements.txt
fi
pip --no-deps imagecorruptions==1.1.2 # for frost's photographs; its code is not used
echo "$stamp" >.venv/installed
