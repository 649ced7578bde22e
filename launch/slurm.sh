#!/usr/bin/env bash
# Jobs on a SLURM cluster, with the checkout and the run's folder on a file system that its nodes share:
#
#   bash launch/slurm.sh submit [SBATCH OPTIONS] [--stage FROM=TO] [--requeues N] -- mmkd train --config ... --workdir RUN
#   bash launch/slurm.sh state JOB      queued, running or gone
#   bash launch/slurm.sh logs JOB       the last lines of its log, mmkd-JOB.log in the folder it was submitted from
#   bash launch/slurm.sh cancel JOB
#
# submit prints the job's number. One task is one process: --nodes=2 --ntasks-per-node=1 --gres=gpu:8 gives each of two
# processes eight GPUs. A job that leaves with 75 (preempted, or five minutes before its time is up: saved) is queued
# again, at most N times (20). --stage copies a set to each node's own disk before. --dry-run prints what would be run.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  "" | -h | --help) manual "$0"; exit 0 ;;
  submit | state | logs | cancel) verb=$1; shift ;;
  *) fail "there is no verb '$1'; it is submit, state, logs or cancel" ;;
esac

dry='' job='' options=() inner=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=yes; shift ;;
    --stage | --stage=* | --requeues | --requeues=*) option=${1%%=*}; value "$@"; inner+=("$option=$got"); shift "$taken" ;;
    --) shift; break ;;
    -*=* | --[a-z]*) options+=("$1"); shift ;;
    *)
      [ "$verb" != submit ] || fail "'$1' is no option; write it as --option=value, and the command after --"
      job=$1; shift ;;
  esac
done

if [ "$verb" = submit ]; then
  [ $# -gt 0 ] || fail "submit needs a command after --"
  run sbatch --parsable ${options[@]+"${options[@]}"} "$root/launch/slurm.sbatch" "--root=$root" ${inner[@]+"${inner[@]}"} -- "$@"
  exit
fi
[[ $job =~ ^[0-9]+$ ]] || fail "$verb needs a job's number"
case $verb in
  state)
    if [ -n "$dry" ]; then run squeue --noheader "--jobs=$job" --format=%T; exit; fi
    code=0
    found=$(squeue --noheader "--jobs=$job" --format=%T 2>&1) || code=$?
    case $found in
      PENDING* | REQUEUE*) echo queued ;;
      "" | *"Invalid job id"* | COMPLETED* | CANCELLED* | FAILED* | TIMEOUT* | NODE_FAIL* | OUT_OF_MEMORY* | BOOT_FAIL* | DEADLINE*) echo gone ;;
      PREEMPTED* | RUNNING* | COMPLETING* | CONFIGURING* | SUSPENDED* | STAGE_OUT* | SIGNALING* | STOPPED* | RESIZING*) echo running ;;
      *) printf '%s\n' "$found" >&2; advise "$code" "$found"; exit "$((code ? code : 1))" ;;
    esac ;;
  logs) run tail -n 40 "mmkd-$job.log" ;;
  cancel) run scancel "$job" ;;
esac
