#!/usr/bin/env bash
# What tpu_vm.sh runs on each VM of a slice, over ssh, in the folder that it copied there:
#   tpu_worker.sh install | start WAIT OUT BUCKET FLAGS... | train OUT BUCKET FLAGS... | follow | stop
# State is in .launch/: pid, log and (at the end) code, the exit code of training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "tpu_worker: error: $*" >&2
  exit 2
}

running() { [[ -f .launch/pid ]] && kill -0 "$(<.launch/pid)" 2>/dev/null; }

# The interpreter of the VM image may be older than the 3.11 that jax needs; then uv brings one.
install() {
  local python found=""
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      found=$python
      break
    fi
  done
  if [[ ! -x .venv/bin/python ]] && { [[ -z $found ]] || ! "$found" -m venv .venv; }; then
    rm -rf .venv
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --python 3.12 --seed .venv
  fi
  .venv/bin/python -m pip install --quiet -e '.[tpu]'
  echo "installed on $(hostname)"
}

# Training goes on when ssh ends. After a restart another worker may still be ending (its heartbeat): wait for it.
start() {
  local wait=$1 waited=0
  shift
  while running; do
    ((waited < wait)) || fail "a run is under way on $(hostname); see it with logs, end it with stop"
    sleep 5
    waited=$((waited + 5))
  done
  mkdir -p .launch
  [[ ! -f .launch/log ]] || mv .launch/log ".launch/log.$(date +%s)"
  rm -f .launch/code
  nohup setsid bash launch/tpu_worker.sh train "$@" >.launch/log 2>&1 </dev/null &
  echo $! >.launch/pid
}

train() {
  local out=$1 bucket=$2 worker code stopped child saver=""
  shift 2
  echo $$ >.launch/pid
  worker=$(curl -sf -m 5 -H 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/agent-worker-number") || worker=0
  local command=(.venv/bin/python -m opsa_jax.train "$@" --out "$out" --resume)
  if [[ -n $bucket ]]; then
    command+=(--train.checkpoints "$bucket/checkpoints")
    # On a new slice the run directory comes from the bucket, so that --resume finds the run.
    if [[ ! -d $out ]] && gcloud storage ls "$bucket/run/config.json" >/dev/null 2>&1; then
      mkdir -p "$out"
      gcloud storage rsync --quiet --recursive "$bucket/run" "$out"
    fi
  fi
  trap 'stopped=true; kill -TERM "$child" 2>/dev/null || true' TERM
  echo "+ ${command[*]@Q}"
  "${command[@]}" &
  child=$!
  if [[ -n $bucket && $worker == 0 ]]; then
    keep_often "$out" "$bucket" &
    saver=$!
  fi
  while :; do # a signal ends `wait`, but not the training, which saves
    stopped=false code=0
    wait "$child" || code=$?
    $stopped || break
  done
  if [[ -n $saver ]]; then
    kill "$saver" 2>/dev/null || true
    keep "$out" "$bucket"
  fi
  echo "$code" >.launch/code
  echo "training ended with exit code $code"
}

# The run directory to the bucket, but for checkpoints, which training itself puts there.
keep() {
  [[ ! -d $1 ]] || gcloud storage rsync --quiet --recursive '--exclude=^checkpoints/.*' "$1" "$2/run" || echo "could not copy $1 to $2/run"
}

keep_often() {
  trap 'kill "$!" 2>/dev/null || true; exit' TERM
  while :; do
    sleep "${OPSA_SYNC:-300}" &
    wait "$!"
    keep "$@"
  done
}

# Shows the log until training ends; exit code: that of training.
follow() {
  [[ -f .launch/pid ]] || fail "no run on $(hostname)"
  tail -n +1 -F --pid="$(<.launch/pid)" .launch/log 2>/dev/null || true
  [[ -f .launch/code ]] || fail "training on $(hostname) was killed; see .launch/log there"
  exit "$(<.launch/code)"
}

stop() {
  if running && kill -TERM "$(<.launch/pid)"; then
    echo "asked the run on $(hostname) to save and end"
  else
    echo "no run under way on $(hostname)"
  fi
}

"$@"
