#!/usr/bin/env bash
# Train on one machine with 1 to 8 NVIDIA GPUs, as one process that drives them all.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/gpu.sh [options] [-- RECIPE AND FLAGS OF opsa_jax.train]

  launch/gpu.sh -- configs/opsa/qwen3_0p6b.py --out runs/opsa
  launch/gpu.sh --gpus 0,1 -- configs/opsa/qwen3_1p7b.py --mesh.data 2 --mesh.fsdp 1

Makes .venv with the cuda extra (CUDA 12 for drivers before 580) where it is missing, and runs the training. By default weights and
batch are split over all GPUs (--mesh.fsdp -1). The exit code is that of training: 0 done, 75 saved after SIGTERM (the same command
with --resume goes on).

Options
  --gpus LIST   numbers of the GPUs to use, such as 0,1; default: all
  --venv DIR    virtual environment (.venv)
  --no-install  use the virtual environment as it is
  --dry-run     print every command, run none
  --help
TEXT
}

fail() {
  echo "gpu: error: $*" >&2
  exit 2
}

step() {
  if $dry_run; then
    echo "${*@Q}"
  else
    echo "+ ${*@Q}" >&2
    "$@"
  fi
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 or newer is needed, this is $BASH_VERSION"
gpus="" venv=.venv install=true dry_run=false train=()
packages=(-e '.[cuda]') # CUDA 13, which needs a driver from 580 on; for an older one below: CUDA 12
while (($#)); do
  case $1 in
    --gpus | --venv)
      [[ -n ${2:-} ]] || fail "$1 needs a value (--help)"
      declare "${1#--}=$2"
      shift
      ;;
    --no-install) install=false ;;
    --dry-run) dry_run=true ;;
    --help | -h) usage && exit 0 ;;
    --) train=("${@:2}") && break ;;
    *) fail "no option $1; the recipe and flags of training go after -- (--help)" ;;
  esac
  shift
done
[[ -z $gpus || $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus $gpus must be numbers separated by commas, such as 0,1"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! $dry_run; then
  command -v nvidia-smi >/dev/null || fail "nvidia-smi is not there: no NVIDIA driver; without a GPU run python -m opsa_jax.train itself"
  query=(nvidia-smi '--query-gpu=index,name,memory.total,driver_version' '--format=csv,noheader')
  found=$("${query[@]}" 2>&1) || fail "nvidia-smi finds no GPU: ${found//$'\n'/ }"
  echo "$found" >&2
  for gpu in ${gpus//,/ }; do
    grep -q "^$gpu," <<<"$found" || fail "there is no GPU $gpu; there are: $(cut -d, -f1 <<<"$found" | paste -sd,)"
  done
  driver=${found##*, }
  if ((${driver%%.*} < 580)); then packages=(-e . 'jax[cuda12]'); fi
fi

if $install; then
  if [[ ! -x $venv/bin/python ]]; then
    python=python3
    $dry_run || "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "Python 3.11 or newer is needed, this is $("$python" --version)"
    step "$python" -m venv "$venv"
  fi
  step "$venv/bin/python" -m pip install --quiet "${packages[@]}"
elif ! $dry_run && [[ ! -x $venv/bin/python ]]; then
  fail "$venv has no bin/python; leave --no-install out, or give --venv"
fi

command=("$venv/bin/python" -m opsa_jax.train "${train[@]}")
if [[ -n $gpus ]]; then command=(env "CUDA_VISIBLE_DEVICES=$gpus" "${command[@]}"); fi
# By exec, so that a signal to this script reaches the training, which then saves.
if $dry_run; then step "${command[@]}"; else exec "${command[@]}"; fi
