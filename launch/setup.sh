#!/usr/bin/env bash
# Sets up .venv in the checkout, once: bash launch/setup.sh [EXTRA ...]   (extras of pyproject.toml: demo, test, gcs)
#
# MMKD_JAX=cpu|cuda|cuda12|cuda13|tpu   which build of JAX (default cpu; cuda is cuda12)
# MMKD_PYTHON=python3.12                the Python to make .venv with (default: 3.11 if there is one, else a later one)
#
# A second run finds that nothing has changed and takes no time; an interrupted one is taken up by the next.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.mmkd-setup

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$@"; exit 2; }

case ${MMKD_JAX:=cpu} in
  cpu) build= ;;
  cuda | cuda12) build=cuda12 ;;
  cuda13 | tpu) build=$MMKD_JAX ;;
  *) fail "MMKD_JAX=$MMKD_JAX is not one of cpu, cuda, cuda12, cuda13, tpu" ;;
esac
for extra in "$@"; do
  [[ $extra =~ ^[a-z0-9]+$ ]] && grep -q "^$extra = \[" "$root/pyproject.toml" || fail "pyproject.toml has no extra '$extra'"
done

# Python 3.11 or later that can make virtual environments; empty output where there is none.
find_python() {
  local candidate
  for candidate in "$@"; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
}

get_python() {
  local names=(python3.11 python3.12 python3.13 python3.14 python3 python) name found
  [ -z "${MMKD_PYTHON:-}" ] || names=("$MMKD_PYTHON")
  found=$(find_python "${names[@]}")
  [ -z "$found" ] || { printf '%s\n' "$found"; return; }
  for name in "${names[@]}"; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      name=$("$name" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
      fail "$name cannot make virtual environments; install $name-venv (Debian, Ubuntu: apt install $name-venv)"
    fi
  done
  fail "no Python 3.11 or later${MMKD_PYTHON:+ under the name $MMKD_PYTHON}; install one (Debian, Ubuntu: apt install" \
    "python3.11-venv; macOS: brew install python@3.11; else: python.org/downloads), or name it by MMKD_PYTHON"
}

key=$(printf '%s %s\n' "$root" "$build" | cat - "$root/pyproject.toml" "$root/launch/constraints.txt" | cksum)
wanted=("$@")
if [ -f "$stamp" ] && { read -r old_key && read -r installed || true; } <"$stamp" && "$venv/bin/python" -c '' 2>/dev/null; then
  if [ "$old_key" = "$key" ]; then
    missing=
    for extra in "$@"; do
      [[ " $installed " == *" $extra "* ]] || missing=yes
    done
    [ -n "$missing" ] || exit 0
  fi
  read -ra before <<<"$installed"
  wanted+=(${before[@]+"${before[@]}"}) # what is there stays
fi
extras=$(printf '%s\n' ${wanted[@]+"${wanted[@]}"} | sort -u | paste -sd ' ' -)

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(get_python)
  say "making .venv with $("$python" --version) ($python)"
  "$python" -m venv --clear "$venv" || fail "$python could not make $venv"
fi
rm -f "$stamp"
say "installing mmkd-jax (JAX for $MMKD_JAX${extras:+; extras: $extras}); the first time takes some minutes"
# Not compiled to bytecode: Python does that with the modules that are used, when they are.
chosen=$(printf '%s' "$build${build:+${extras:+ }}$extras" | tr ' ' ',')
"$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check \
  --constraint "$root/launch/constraints.txt" --editable "$root${chosen:+[$chosen]}" || fail "pip failed (see above); mend it and run this again, it goes on from there"
printf '%s\n%s\n' "$key" "$extras" >"$stamp"
say "ready: source $venv/bin/activate, then mmkd --help"
