#!/usr/bin/env bash
# A command on this machine: on its accelerators, on fake devices of the CPU, or as several processes.
#
#   bash launch/local.sh -- mmkd train --config configs/stage1_clip.py:smoke --workdir RUN ...
#   bash launch/local.sh --devices 8 -- mmkd train ...                   eight fake devices
#   bash launch/local.sh --processes 2 --devices 4 -- mmkd train ...     two processes of four each, as on two hosts
#
# --dry-run prints what would be run. Each process's lines begin with its number. When one fails the others are ended;
# SIGTERM goes to all, and the exit code is the first that is not 0 (75: saved and left; the same command goes on).
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

devices='' processes=1 dry='' port=${MMKD_PORT:-$((20000 + $$ % 20000))}
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) manual "$0"; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    --devices | --devices=*) value "$@"; devices=$got; shift "$taken" ;;
    --processes | --processes=*) value "$@"; processes=$got; shift "$taken" ;;
    --) shift; break ;;
    *) fail "unknown option '$1' (see bash launch/local.sh --help)" ;;
  esac
done
[ $# -gt 0 ] || fail "it needs a command after --"
for number in "$processes" "${devices:-1}"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number is not a number of processes or devices"
done
[ ! -d "$root/.venv/bin" ] || export PATH="$root/.venv/bin:$PATH"

settings=()
[ -z "$devices" ] || settings+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
if [ "$processes" = 1 ]; then
  [ -z "$dry" ] || { run env ${settings[@]+"${settings[@]}"} "$@"; exit; }
  exec env ${settings[@]+"${settings[@]}"} "$@"
fi
# The CPU's collectives wait half a minute for a process; one that finds its program compiled would wait for the others.
[ -z "$devices" ] || settings+=(JAX_ENABLE_COMPILATION_CACHE=false)
settings+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes")
started=()
for ((i = 0; i < processes; i++)); do
  if [ -n "$dry" ]; then
    run env "${settings[@]}" "JAX_PROCESS_ID=$i" "$@"
  else
    env "${settings[@]}" "JAX_PROCESS_ID=$i" "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    started+=("$!")
  fi
done
[ -z "$dry" ] || exit 0
trap 'kill -TERM "${started[@]}" 2>/dev/null || true' TERM INT
result=0 left=${#started[@]}
while [ "$left" -gt 0 ]; do
  code=0
  wait -n -p ended "${started[@]}" || code=$?
  [ -n "${ended:-}" ] || continue # a signal, not a process
  left=$((left - 1))
  for i in "${!started[@]}"; do [ "${started[i]}" != "$ended" ] || unset 'started[i]'; done
  if [ "$code" != 0 ] && [ "$result" = 0 ]; then
    result=$code
    [ "$left" = 0 ] || [ "$code" = 75 ] || kill -TERM "${started[@]}" 2>/dev/null || true
  fi
  ended=
done
exit "$result"
