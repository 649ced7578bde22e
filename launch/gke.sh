#!/usr/bin/env bash
# TPU slices on Google Kubernetes Engine by XPK (https://github.com/AI-Hypercomputer/xpk):
#
#   bash launch/gke.sh cluster --cluster C --type v5litepod-16 [--slices N] [--spot] [--zone Z] [--project P]
#   bash launch/gke.sh image   --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/mmkd:TAG       builds and pushes it
#   bash launch/gke.sh run NAME --cluster C --image IMAGE --type v5litepod-16 [--slices N] [--env NAME=VALUE] \
#     [--retries N] -- mmkd train --config configs/stage1_clip.py --workdir gs://BUCKET/RUN ...
#   bash launch/gke.sh state  NAME ...        queued, running or gone
#   bash launch/gke.sh status NAME --cluster C     what XPK says of it
#   bash launch/gke.sh logs   NAME ...        the last lines of each pod
#   bash launch/gke.sh delete NAME --cluster C
#
# Exit codes 75 (preempted: saved) and 76 (the watchdog's) start the job again, at most N times (20); a lost slice does
# too. --dry-run prints what would be run. state and logs ask kubectl, whose current context must be the cluster.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  "" | -h | --help) manual "$0"; exit 0 ;;
  cluster | image) verb=$1; shift ;;
  run | state | status | logs | delete)
    verb=$1 job=${2:-}
    [[ $job =~ ^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$ ]] || fail "the name '$job' must be lower-case letters, digits and -, at most 39"
    shift 2 ;;
  *) fail "there is no verb '$1'; it is cluster, image, run, state, status, logs or delete" ;;
esac

where=() variables=() spot=() cluster='' type='' image='' slices=1 retries=20 dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=yes; shift ;;
    --spot) spot=(--spot); shift ;;
    --zone | --zone=* | --project | --project=*) option=${1%%=*}; value "$@"; where+=("$option=$got"); shift "$taken" ;;
    --cluster | --cluster=*) value "$@"; cluster=$got; shift "$taken" ;;
    --type | --type=*) value "$@"; type=$got; shift "$taken" ;;
    --image | --image=*) value "$@"; image=$got; shift "$taken" ;;
    --slices | --slices=*) value "$@"; slices=$got; shift "$taken" ;;
    --retries | --retries=*) value "$@"; retries=$got; shift "$taken" ;;
    --env | --env=*) value "$@"; variables+=("--env=$got"); shift "$taken" ;;
    --) shift; break ;;
    *) fail "unknown option '$1' (see bash launch/gke.sh --help)" ;;
  esac
done
needs() {
  local option
  for option in "$@"; do [ -n "${!option}" ] || fail "$verb needs --$option"; done
}

case $verb in
  cluster)
    needs cluster type
    run xpk cluster create "--cluster=$cluster" "--tpu-type=$type" "--num-slices=$slices" ${spot[@]+"${spot[@]}"} ${where[@]+"${where[@]}"} ;;
  image)
    needs image
    run docker build --file "$root/launch/Dockerfile" --tag "$image" "$root"
    run docker push "$image" ;;
  run)
    needs cluster type image
    [ $# -gt 0 ] || fail "run needs a command after --"
    # XPK puts the command into a line of YAML, and passes SIGTERM on to the process that `exec` leaves there.
    [[ "$*" != *$'\n'* ]] || fail "the command has a line break, which XPK cannot take"
    run xpk workload create "--workload=$job" "--cluster=$cluster" "--tpu-type=$type" "--num-slices=$slices" \
      "--docker-image=$image" "--command=exec $(quoted "$@")" "--max-restarts=$retries" --restart-on-exit-codes=75,76 \
      --termination-grace-period-seconds=300 ${variables[@]+"${variables[@]}"} ${where[@]+"${where[@]}"} ;;
  state)
    look=(kubectl get jobset "$job" '--output=jsonpath={.status.conditions[?(@.status=="True")].type} {.status.replicatedJobsStatus[*].active}')
    if [ -n "$dry" ]; then run "${look[@]}"; exit; fi
    code=0
    found=$("${look[@]}" 2>&1) || code=$?
    case " $found " in
      *" Completed "* | *" Failed "* | *"(NotFound)"*) echo gone ;;
      *) if [ "$code" != 0 ]; then printf '%s\n' "$found" >&2; advise "$code" "$found"; exit "$code"; fi
         if [[ $found == *[1-9]* ]]; then echo running; else echo queued; fi ;;
    esac ;;
  status)
    needs cluster
    run xpk workload list "--cluster=$cluster" "--filter-by-job=$job" ${where[@]+"${where[@]}"} ;;
  logs) run kubectl logs "--selector=jobset.sigs.k8s.io/jobset-name=$job" --all-containers --prefix --tail=40 ;;
  delete)
    needs cluster
    run xpk workload delete "--workload=$job" "--cluster=$cluster" --force ${where[@]+"${where[@]}"} ;;
esac
