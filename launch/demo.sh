#!/usr/bin/env bash
# The whole road on one machine, from pictures to a distilled student and its report: bash launch/demo.sh [--fast ...]
#
# Arguments go to `mmkd demo`; results to runs/demo in the checkout unless --workdir says otherwise.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh" demo
for argument in "$@"; do
  case $argument in --workdir | --workdir=* | -h | --help) exec "$root/.venv/bin/mmkd" demo "$@" ;; esac
done
exec "$root/.venv/bin/mmkd" demo --workdir "$root/runs/demo" "$@"
