#!/usr/bin/env bash
# Ten minutes on a TPU host (a v5e-8, a v4-8, ...), in this checkout on it: bash launch/tpu_smoke.sh [--out FILE.json] ...
#
# Sets up .venv with JAX for TPU, then checks numerics against the CPU, runs both stages, kills and resumes a run, and
# measures pairs/s and MFU. One JSON file to send back, mmkd-tpu.json unless told otherwise; further options go to
# launch/smoke.py. --dry-run prints what would be run. From elsewhere, on a slice of one host:
#   bash launch/tpu.sh exec NAME -- bash launch/tpu_smoke.sh
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dry='' out=mmkd-tpu.json words=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) manual "$0"; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    --out | --out=*) value "$@"; out=$got; shift "$taken" ;;
    *) words+=("$1"); shift ;;
  esac
done
run env MMKD_JAX=tpu bash "$root/launch/setup.sh"
run "$root/.venv/bin/python" "$root/launch/smoke.py" --platform tpu "--out=$out" ${words[@]+"${words[@]}"}
