#!/usr/bin/env bash
# TPU pods as queued resources of Google Cloud, from nothing to a running job:
#
#   bash launch/tpu.sh create NAME --type v5litepod-16 [--zone Z] [--project P] [--spot] [--slices N] [--version IMAGE]
#   bash launch/tpu.sh wait   NAME ...               until it is there; ends with an error if it never will be
#   bash launch/tpu.sh setup  NAME ...               this checkout (what is committed) to all workers, installed there
#   bash launch/tpu.sh run    NAME ... -- mmkd train --config configs/stage1_clip.py --workdir gs://BUCKET/RUN
#   bash launch/tpu.sh status NAME ...               state of the slice, and of the job on each worker
#   bash launch/tpu.sh logs   NAME ...               the last lines of each worker's log
#   bash launch/tpu.sh exec   NAME ... -- COMMAND    on all workers, and waits: staging, a look around
#   bash launch/tpu.sh delete NAME ...
#
# --dry-run prints what would be run. --env NAME=VALUE (run; may be repeated) sets a variable of the job. Zone and
# project are gcloud's own unless given. With --slices N every verb needs it. The job goes on when this machine does
# not; launch/babysit watches it. TPU7x is had through GKE only: launch/gke.sh.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() { manual "$0"; }
case ${1:-} in
  "" | -h | --help) usage; exit 0 ;;
  create | wait | setup | run | status | logs | exec | delete | state) verb=$1 ;;
  *) fail "there is no verb '$1'; it is create, wait, setup, run, status, logs, exec or delete" ;;
esac
slice=${2:-}
[[ $slice =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "the name '$slice' must be lower-case letters, digits and -, at most 40"
shift 2

where=() spot=() variables=() type='' version='' slices=1 dry='' poll=30
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=yes; shift ;;
    --spot) spot=(--spot); shift ;;
    --zone | --zone=* | --project | --project=*) option=${1%%=*}; value "$@"; where+=("$option=$got"); shift "$taken" ;;
    --type | --type=*) value "$@"; type=$got; shift "$taken" ;;
    --version | --version=*) value "$@"; version=$got; shift "$taken" ;;
    --slices | --slices=*) value "$@"; slices=$got; shift "$taken" ;;
    --env | --env=*) value "$@"; variables+=("$got"); shift "$taken" ;;
    --poll | --poll=*) value "$@"; poll=$got; shift "$taken" ;;
    --) shift; break ;;
    *) fail "unknown option '$1' (see bash launch/tpu.sh --help)" ;;
  esac
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices is not a number of slices"
[[ $verb = run || $verb = exec ]] || [ $# = 0 ] || fail "$verb takes no command"
[[ $verb != run && $verb != exec ]] || [ $# -gt 0 ] || fail "$verb needs a command after --"

queued=(gcloud compute tpus queued-resources)
nodes=("$slice")
[ "$slices" = 1 ] || mapfile -t nodes < <(for ((i = 0; i < slices; i++)); do echo "$slice-$i"; done)

image() {
  case $type in
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    tpu7x-*) fail "TPU7x is not had as a queued resource; use launch/gke.sh" ;;
    "") fail "create needs --type, such as v5litepod-16" ;;
    *) fail "the image for --type $type is not known here; name it by --version" ;;
  esac
}

# The queued resource's state in one word; ABSENT where there is none.
state() {
  local found code=0
  found=$("${queued[@]}" describe "$slice" ${where[@]+"${where[@]}"} '--format=value(state.state)' 2>&1) || code=$?
  if [ "$code" = 0 ]; then
    echo "${found##*$'\n'}"
  elif grep -qi 'not.found' <<<"$found" && grep -qi "queuedResources/$slice\b" <<<"$found"; then
    echo ABSENT
  else
    printf '%s\n' "$found" >&2
    advise "$code" "$found"
    return "$code"
  fi
}

await() {
  local now before=
  while now=$(state); do
    [ "$now" = "$before" ] || say "$slice: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | ABSENT) say "$slice will not come: $now; delete it and create it again"; return 1 ;;
    esac
    sleep "$poll"
  done
  return 1
}

on_all() {
  local node code=0
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" ${where[@]+"${where[@]}"} --worker=all "--command=$1" || code=$?
  done
  return "$code"
}

setup() {
  local archive node
  archive=${TMPDIR:-/tmp}/mmkd-$slice.tar.gz
  run git -C "$root" archive --format=tar.gz --prefix=mmkd_jax/ -o "$archive" HEAD
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:mmkd.tar.gz" ${where[@]+"${where[@]}"} --worker=all
  done
  rm -f "$archive"
  on_all "rm -rf mmkd_jax/{mmkd_jax,teachers,configs,launch} && tar xzf mmkd.tar.gz && MMKD_JAX=tpu bash mmkd_jax/launch/setup.sh gcs"
}

# The job's own shell: its process id, output and exit code lie in ~/mmkd-job, so that no connection is needed.
start_job() {
  local job
  # shellcheck disable=SC2016 # for the worker's shell
  job='cd ~/mmkd_jax; export PATH=$PWD/.venv/bin:$PATH; echo $$ >~/mmkd-job/pid; "$@"; echo $? >~/mmkd-job/exit'
  # shellcheck disable=SC2088 # for the worker's shell
  on_all "mkdir -p ~/mmkd-job && rm -f ~/mmkd-job/exit && { setsid nohup bash -c $(quoted "$job") job $(quoted env ${variables[@]+"${variables[@]}"} "$@") >>~/mmkd-job/log 2>&1 </dev/null & }"
}

# shellcheck disable=SC2016 # for the worker's shell
look='j=~/mmkd-job; if [ -f $j/exit ]; then s="exit $(cat $j/exit)"; elif [ ! -f $j/pid ]; then s=none; elif kill -0 "$(cat $j/pid)" 2>/dev/null; then s=running; else s=lost; fi; echo "mmkd-job $(hostname) $s"'
# shellcheck disable=SC2016
tail='tail -n 40 ~/mmkd-job/log | sed "s/^/$(hostname): /"'

case $verb in
  create)
    [ -n "$version" ] || version=$(image)
    [ -n "$type" ] || fail "create needs --type, such as v5litepod-16"
    shape=("--node-id=$slice")
    [ "$slices" = 1 ] || shape=("--node-count=$slices" "--node-prefix=$slice")
    run "${queued[@]}" create "$slice" "${shape[@]}" ${where[@]+"${where[@]}"} "--accelerator-type=$type" \
      "--runtime-version=$version" ${spot[@]+"${spot[@]}"} ;;
  state) if [ -n "$dry" ]; then run "${queued[@]}" describe "$slice" ${where[@]+"${where[@]}"} '--format=value(state.state)'; else state; fi ;;
  wait) if [ -n "$dry" ]; then run "${queued[@]}" describe "$slice" ${where[@]+"${where[@]}"} '--format=value(state.state)'; else await; fi ;;
  setup) setup ;;
  run) start_job "$@" ;;
  exec) on_all "cd ~/mmkd_jax && PATH=\$PWD/.venv/bin:\$PATH $(quoted "$@")" ;;
  status)
    if [ -n "$dry" ]; then run "${queued[@]}" describe "$slice" ${where[@]+"${where[@]}"} '--format=value(state.state)'; else now=$(state); echo "$slice: $now"; fi
    [ -z "$dry" ] && [ "$now" != ACTIVE ] || on_all "$look" ;;
  logs) on_all "$tail" ;;
  delete) run "${queued[@]}" delete "$slice" ${where[@]+"${where[@]}"} --force --quiet ;;
esac
