#!/usr/bin/env bash
# Ten minutes on a machine with GPUs: bash launch/gpu_smoke.sh [--wheels DIR] [--out FILE.json] ...
#
# Checks numerics against the CPU, runs both stages, kills and resumes a run, and measures pairs/s and MFU. One JSON
# file to send back, mmkd-gpu.json unless told otherwise; further options go to launch/smoke.py. --dry-run prints what
# would be run. Without --wheels it sets up .venv with JAX for CUDA. With it nothing is fetched: python3 (or
# MMKD_PYTHON) has jax for CUDA and flax, and the wheels in DIR, all of them, go into a folder of their own beside it.
# launch/README.md lists the wheels.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dry='' out=mmkd-gpu.json wheels='' words=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) manual "$0"; exit 0 ;;
    --dry-run) dry=yes; shift ;;
    --out | --out=*) value "$@"; out=$got; shift "$taken" ;;
    --wheels | --wheels=*) value "$@"; wheels=$got; shift "$taken" ;;
    *) words+=("$1"); shift ;;
  esac
done

python=$root/.venv/bin/python
if [ -n "$wheels" ]; then
  [ -d "$wheels" ] || fail "--wheels $wheels is not a folder"
  compgen -G "$wheels/*.whl" >/dev/null || fail "--wheels $wheels holds no wheel"
  python=${MMKD_PYTHON:-python3}
  site=${TMPDIR:-/tmp}/mmkd-wheels-$(id -u)
  run rm -rf "$site"
  run "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
else
  run env MMKD_JAX="${MMKD_JAX:-cuda}" bash "$root/launch/setup.sh"
fi
# JAX takes memory as it needs it: parts that compare the CPU with the GPU, and whatever else runs there, have room.
run env XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" "$root/launch/smoke.py" --platform cuda "--out=$out" ${words[@]+"${words[@]}"}
