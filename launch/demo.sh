#!/usr/bin/env bash
# The whole road on one machine, from pictures to a distilled student and its report: bash launch/demo.sh [--fast ...]
#
# Arguments go to `mmkd demo`; results to runs/demo in the checkout unless --workdir says otherwise.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh" demo
# glibc gives large buffers back to the system and takes them again at every step, which costs more than the mathematics
# of a small model; it keeps them instead. (In one arena the compiler's threads would wait for each other.)
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-2} MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-20000000000} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
for argument in "$@"; do
  case $argument in --workdir | --workdir=* | -h | --help) exec "$root/.venv/bin/mmkd" demo "$@" ;; esac
done
exec "$root/.venv/bin/mmkd" demo --workdir "$root/runs/demo" "$@"
