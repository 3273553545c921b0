#!/usr/bin/env bash
# Train on a Cloud TPU VM slice of one or many hosts: create it, install on all of them, run the same command on all of them
# (multi-controller JAX finds its processes by itself), follow the log, go on after a preemption, fetch the run, delete the slice.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh COMMAND --name NAME [options] [-- RECIPE AND FLAGS OF opsa_jax.train]

  launch/tpu_vm.sh all --name opsa --zone us-west4-a --type v5litepod-16 --spot --bucket gs://BUCKET/opsa --out runs/opsa \
    -- configs/opsa/qwen3_0p6b.py --mesh.fsdp 16

Commands
  create    create the slice, or use the one of that name
  install   copy this folder (or clone --repo) to all workers and install it there with the tpu extra
  run       start training on all workers and follow worker 0; goes on after a preemption
  logs      follow worker 0 of a run under way
  stop      ask a run under way to save and end
  fetch     copy the run directory here
  delete    delete the slice (and its queued resource)
  all       create, install, run, fetch; delete too with --delete

Options
  --name NAME         slice
  --project PROJECT   default: CLOUDSDK_CORE_PROJECT, or what gcloud is set to
  --zone ZONE         default: CLOUDSDK_COMPUTE_ZONE, or what gcloud is set to
  --type TYPE         accelerator type, such as v5litepod-16, v5p-128, v6e-64
  --runtime VERSION   software of the VMs; default by type
  --spot              cheaper, and may be taken away
  --queued            wait in the queue for capacity (queued resource of the same name)
  --create-flag FLAG  passed on to gcloud's create, such as --create-flag=--network=NETWORK; repeatable
  --repo URL          clone this instead of copying this folder; --ref REF chooses branch, tag or commit
  --out DIR           run directory, relative; needed by run, fetch and all
  --bucket GS_FOLDER  gs://BUCKET/FOLDER that keeps checkpoints and run directory; without it a lost slice is a lost run
  --max-restarts N    times that run starts again by itself (10)
  --delete            all: delete the slice at the end, whatever happened
  --dry-run           print every command, run none
  --help

Training is started with --out DIR --resume, so the same command goes on where it stopped. Its exit codes: 0 done; 75 saved before a
preemption and 69 lost another process, which both start again (on a new slice where the old one is gone); others end this script.
Data files of the recipe are copied with the folder, or given as hf: or tfds: names. VMs reach the bucket with their service account.
TEXT
}

fail() {
  echo "tpu_vm: error: $*" >&2
  exit 2
}

note() { echo "tpu_vm: $*" >&2; }

quoted() { # as it could be typed
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line# }"
}

# Print a command, and run it unless --dry-run. File 3 is stdout, also where stdout is captured.
step() {
  if $dry_run; then
    quoted "$@" >&3
  else
    note "+ $(quoted "$@")"
    "$@"
  fi
}

tpu() { # tpu GROUP VERB ARGUMENTS
  step gcloud compute tpus "$@" "--zone=$zone" "--project=$project"
}

on_workers() { # on_workers WHICH COMMAND
  tpu tpu-vm ssh "$name" --quiet "--worker=$1" "--command=cd opsa_jax && $2"
}

# A word: the state of the slice or of its queued resource (and the type); ABSENT where there is none, and in a dry run.
state_of() { # state_of tpu-vm|queued-resources FORMAT
  local text look=(gcloud compute tpus "$1" describe "$name" "--format=value($2)" "--zone=$zone" "--project=$project")
  if $dry_run; then
    step "${look[@]}"
    echo ABSENT
  elif text=$("${look[@]}" 2>&1); then
    echo "${text##*$'\n'}"
  elif [[ $text == *NOT_FOUND* || $text == *"not found"* ]]; then
    echo ABSENT
  else
    fail "gcloud cannot look at $name in $project, $zone: $(tr '\n' ' ' <<<"${text##*ERROR: }")"
  fi
}

create() {
  [[ -n $type ]] || fail "create needs --type, such as v5litepod-16"
  local found state kind
  found=$(state_of tpu-vm state,acceleratorType)
  read -r state kind <<<"$found"
  case $state in
    READY)
      [[ -z $kind || $kind == *"$type" ]] || fail "slice $name is a ${kind##*/}, not $type; delete it, or choose another --name"
      note "using slice $name"
      return
      ;;
    PREEMPTED | TERMINATED | STOPPED)
      note "slice $name is $state: creating it anew"
      delete
      state=ABSENT
      ;;
  esac
  local flags=("--accelerator-type=$type")
  if $spot; then flags+=(--spot); fi
  flags+=("${create_flags[@]}")
  if $queued; then
    create_queued "${flags[@]}"
  elif [[ $state == ABSENT ]]; then
    tpu tpu-vm create "$name" "--version=${runtime:-$(runtime_of)}" "${flags[@]}"
  fi
  $dry_run || wait_for tpu-vm state READY
}

create_queued() {
  local state
  state=$(state_of queued-resources state.state)
  if [[ $state == SUSPENDING ]]; then
    wait_for queued-resources state.state SUSPENDED
    state=SUSPENDED
  fi
  if [[ $state == SUSPENDED || $state == FAILED ]]; then
    tpu queued-resources delete "$name" --quiet --force
    state=ABSENT
  fi
  if [[ $state == ABSENT ]]; then
    tpu queued-resources create "$name" "--node-id=$name" "--runtime-version=${runtime:-$(runtime_of)}" "$@"
  fi
  $dry_run || wait_for queued-resources state.state ACTIVE
}

runtime_of() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

wait_for() { # wait_for tpu-vm|queued-resources FORMAT STATE
  local state
  while :; do
    state=$(state_of "$1" "$2")
    case $state in
      "$3") return ;;
      "" | ABSENT | PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED)
        fail "$1 $name is $state; see gcloud compute tpus $1 describe $name"
        ;;
    esac
    note "$1 $name is $state"
    sleep "$poll"
  done
}

install() {
  local checkout="{ test -d opsa_jax || git clone ${repo@Q} opsa_jax; } && cd opsa_jax && git fetch --quiet --tags origin"
  if [[ -n $repo ]]; then
    tpu tpu-vm ssh "$name" --quiet --worker=all "--command=$checkout && git checkout --quiet ${ref@Q}"
  else
    local archive=${TMPDIR:-/tmp}/opsa_jax-$name.tgz
    local leave=(--exclude=./.git --exclude=.venv --exclude=./runs --exclude=./.launch --exclude=__pycache__)
    leave+=('--exclude=.*_cache' '--exclude=*.egg-info')
    step tar -C "$root" "${leave[@]}" -czf "$archive" .
    tpu tpu-vm scp "$archive" "$name:opsa_jax.tgz" --quiet --worker=all
    step rm -f "$archive"
    tpu tpu-vm ssh "$name" --quiet --worker=all "--command=mkdir -p opsa_jax && tar -xzf opsa_jax.tgz -C opsa_jax"
  fi
  on_workers all "bash launch/tpu_worker.sh install"
}

# Sets `ended` to the exit code of training. (Not by `return`: under `run || ...` a failed step would not end the script.)
run() {
  local restarts=0 wait=0 code state
  [[ -n $bucket ]] || note "no --bucket: checkpoints are on the slice, and lost with it"
  while :; do
    code=0
    on_workers all "bash launch/tpu_worker.sh start $wait ${out@Q} ${bucket@Q} ${train[*]@Q}" || code=$?
    ((code)) || follow || code=$?
    ended=$code
    if $dry_run; then return; fi
    case $code in 0 | 2 | 130) return ;; esac
    state=$(state_of tpu-vm state)
    if [[ $state == READY && $code != 75 && $code != 69 ]]; then return; fi
    if ((restarts >= max_restarts)); then
      note "no more restarts (--max-restarts $max_restarts)"
      return
    fi
    restarts=$((restarts + 1)) wait=600
    note "exit code $code, slice $state: restart $restarts of $max_restarts"
    if [[ $state != READY ]]; then
      [[ -n $bucket ]] || fail "slice $name is $state, and the run is lost with it: no --bucket kept its checkpoints"
      [[ -n $type ]] || fail "slice $name is $state; give --type, so that run can create it anew"
      create
      install
    fi
  done
}

# Follow worker 0; again where only the connection broke. Exit code: that of training.
follow() {
  local code
  while :; do
    code=0
    on_workers 0 "bash launch/tpu_worker.sh follow" || code=$?
    if [[ $code != 255 || $(state_of tpu-vm state) != READY ]]; then return "$code"; fi
    note "lost the connection; trying again"
    sleep "$poll"
  done
}

fetch() {
  if [[ -n $bucket ]]; then
    step mkdir -p "$out"
    step gcloud storage rsync --recursive "$bucket/run" "$out"
  else
    step mkdir -p "$(dirname "$out")"
    tpu tpu-vm scp "$name:opsa_jax/$out" "$(dirname "$out")" --quiet --recurse --worker=0
  fi
}

delete() {
  local state
  state=$(state_of queued-resources state.state)
  if [[ $state != ABSENT ]] || { $dry_run && $queued; }; then
    tpu queued-resources delete "$name" --quiet --force
    return
  fi
  state=$(state_of tpu-vm state)
  if [[ $state != ABSENT ]] || $dry_run; then
    tpu tpu-vm delete "$name" --quiet
  else
    note "there is no slice $name"
  fi
}

all() {
  if $delete_after; then trap delete EXIT; fi
  create
  install
  run
  if ((ended == 0)); then fetch; fi
  $delete_after || note "slice $name is kept, and costs until you delete it: launch/tpu_vm.sh delete --name $name --zone $zone"
}

parse() {
  local flag
  while (($#)); do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}" # --flag=VALUE is --flag VALUE
    flag=$1
    shift
    case $flag in
      --spot) spot=true && continue ;;
      --queued) queued=true && continue ;;
      --delete) delete_after=true && continue ;;
      --dry-run) dry_run=true && continue ;;
      --help | -h) usage && exit 0 ;;
      --) train=("$@") && return ;;
      --name | --project | --zone | --type | --runtime | --repo | --ref | --out | --bucket | --max-restarts | --create-flag) ;;
      *) fail "no option $flag; flags of training go after -- (--help)" ;;
    esac
    [[ -n ${1:-} ]] || fail "$flag needs a value (--help)"
    case $flag in
      --create-flag) create_flags+=("$1") ;;
      --max-restarts) max_restarts=$1 ;;
      *) declare -g "${flag#--}=$1" ;;
    esac
    shift
  done
}

check() {
  local flag
  case $verb in run | all | fetch) [[ -n $out ]] || fail "$verb needs --out, the run directory, such as runs/opsa" ;; esac
  [[ -z $out || $out =~ ^[A-Za-z0-9_][A-Za-z0-9._/-]*$ ]] || fail "--out $out must be a relative path of letters, digits and . _ - /"
  [[ -z $bucket || $bucket =~ ^gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._/-]+)?$ ]] || fail "--bucket $bucket must be gs://BUCKET/FOLDER"
  [[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts $max_restarts must be a number"
  for flag in "${train[@]}"; do
    case $flag in --out | --out=* | --resume | --train.checkpoints*)
      fail "leave $flag out after --: --out and --bucket before it do that"
      ;;
    esac
  done
  [[ -n $name ]] || fail "--name is missing: the slice's name"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || fail "--name $name must be lower-case letters, digits and -, and start with a letter"
  if ! $dry_run; then
    command -v gcloud >/dev/null || fail "gcloud is not installed; install the Google Cloud CLI, then run: gcloud auth login"
    project=${project:-$(gcloud config get-value project 2>/dev/null || true)}
    zone=${zone:-$(gcloud config get-value compute/zone 2>/dev/null || true)}
  fi
  [[ -n $project && $project != "(unset)" ]] || fail "no project; give --project, or run: gcloud config set project PROJECT"
  [[ -n $zone && $zone != "(unset)" ]] || fail "no zone; give --zone, or run: gcloud config set compute/zone ZONE"
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 or newer is needed, this is $BASH_VERSION"
exec 3>&1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll=${OPSA_POLL:-30} # seconds between looks at a slice that is not ready
verb=${1:---help}
name="" project=${CLOUDSDK_CORE_PROJECT:-} zone=${CLOUDSDK_COMPUTE_ZONE:-} type="" runtime="" repo="" ref=HEAD out="" bucket=""
spot=false queued=false delete_after=false dry_run=false max_restarts=10 ended=0 create_flags=() train=()
case $verb in
  create | install | run | logs | stop | fetch | delete | all) ;;
  --help | -h | help) usage && exit 0 ;;
  *) fail "no command $verb; allowed: create, install, run, logs, stop, fetch, delete, all (--help)" ;;
esac
parse "${@:2}"
bucket=${bucket%/}
check
case $verb in install | run | logs | stop | fetch)
  state=$(state_of tpu-vm state)
  [[ $state == READY ]] || $dry_run || [[ $verb == run && -n $bucket && -n $type ]] || [[ $verb == fetch && -n $bucket ]] ||
    fail "slice $name in $zone is $state, not READY; create it first (create)"
  ;;
esac
case $verb in
  create) create ;;
  install) install ;;
  run) run ;;
  logs) follow ;;
  stop) on_workers all "bash launch/tpu_worker.sh stop" ;;
  fetch) fetch ;;
  delete) delete ;;
  all) all ;;
esac
exit "$ended"
