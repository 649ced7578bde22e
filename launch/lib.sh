# shellcheck shell=bash
# What the launch scripts share; sourced, not run. A script sets `dry=yes` to have its commands printed and not run.
# shellcheck disable=SC2034 # the scripts use it
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
self=$(basename "$0" .sh)

say() { printf '%s: %s\n' "$self" "$*" >&2; }
fail() { say "$@"; exit 2; }

# The text between the first comment and the first command of a script: its manual.
manual() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$1"; }

# Words as a shell takes them again.
quoted() {
  local word text=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./~-]+$ ]]; then text+=" $word"; else text+=" '${word//\'/\'\\\'\'}'"; fi
  done
  printf '%s' "${text# }"
}

# Runs a command, or prints it in a dry run. Its own message is shown as it comes; where it fails, what to do follows.
run() {
  if [ "${dry:-}" = yes ]; then
    printf '%s\n' "$(quoted "$@")"
    return
  fi
  command -v "$1" >/dev/null || { say "$1 is not installed here; $(source_of "$1")"; return 127; }
  local code=0 said
  said=$(mktemp)
  if [ "$1" = xpk ]; then # tells its errors on standard output
    "$@" 2>&1 | tee "$said" || code=${PIPESTATUS[0]}
  else
    { "$@" 2>&1 >&3 | tee "$said" >&2 || code=${PIPESTATUS[0]}; } 3>&1
  fi
  [ "$code" = 0 ] || advise "$code" "$(cat "$said")"
  rm -f "$said"
  return "$code"
}

source_of() {
  case $1 in
    gcloud) echo "see https://cloud.google.com/sdk/docs/install" ;;
    xpk) echo "pip install xpk, in an environment of its own (https://github.com/AI-Hypercomputer/xpk)" ;;
    kubectl) echo "gcloud components install kubectl, then gcloud container clusters get-credentials CLUSTER" ;;
    docker) echo "see https://docs.docker.com/engine/install" ;;
    sbatch | squeue | scancel | scontrol) echo "log in to the cluster's login node first" ;;
    rsync) echo "install it, or copy the folder by hand, manifest.json last" ;;
    *) echo "install it first" ;;
  esac
}

# What to do about a tool's message.
advise() {
  local code=$1 text=${2,,}
  case $text in
    *"attribute [project]"*) say "name the project: --project P, or gcloud config set project P" ;;
    *credential* | *"gcloud auth"* | *reauth* | *unauthenticated* | *"no active account"* | *"not logged in"*)
      say "log in: gcloud auth login, then gcloud config set project PROJECT; XPK also needs gcloud auth application-default login" ;;
    *quota* | *resource_exhausted* | *"resource exhausted"* | *qosmax* | *assocmax* | *"job violates accounting"*)
      say "the quota is used up or was never granted: ask for more (https://console.cloud.google.com/iam-admin/quotas; on SLURM, the administrator), take a smaller type, another zone or partition, or --spot" ;;
    *errimagepull* | *imagepullbackoff* | *"manifest unknown"* | *"image not found"* | *"manifest for"* | *"failed to resolve reference"* | *"does not exist in the registry"* | *"docker image exists"*)
      say "the image is not there, or may not be read: bash launch/gke.sh image --image IMAGE builds and pushes it" ;;
    *"unknown zone"* | *"invalid value for field 'zone'"* | *"location"*"not found"* | *"permission denied on 'locations"* | *"permission to access locations"* | *"invalid zone"* | *"zone"*"not found"* | *"attribute [zone]"*)
      say "the zone is wrong, missing, or has no such TPU: gcloud compute tpus locations list; gcloud compute tpus accelerator-types list --zone ZONE" ;;
    *"runtime version"* | *"runtimeversion"* | *"runtime-version"* | *"accelerator type"* | *"acceleratortype"*)
      say "the zone does not have that type or image: gcloud compute tpus accelerator-types list --zone ZONE, gcloud compute tpus versions list --zone ZONE (--version names another)" ;;
    *permission_denied* | *"permission denied"* | *forbidden* | *"not authorized"*)
      say "the account may not do that: ask the project's owner for the role (TPU Admin, Kubernetes Engine Developer), and see that the project is the right one" ;;
    *"invalid partition"* | *"partition"*"not available"*) say "sinfo lists the partitions: --partition=NAME" ;;
    *"unable to contact slurm"* | *"connection refused"* | *"no such host"* | *"could not resolve"*)
      say "the service does not answer: see that this machine reaches it, then try again" ;;
    *) say "that command failed with exit code $code; its own message is above" ;;
  esac
}

# Takes the value of `--option=value` or `--option value`; to be called as: value "$@"; shift "$taken".
# shellcheck disable=SC2034 # the scripts use them
value() {
  case $1 in
    *=*) taken=1 got=${1#*=} ;;
    *) [ $# -gt 1 ] || fail "$1 needs a value"; taken=2 got=$2 ;;
  esac
}
