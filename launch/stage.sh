#!/usr/bin/env bash
# Copies a set (pairs, or features with a folder a teacher) to a local disk: bash launch/stage.sh [--dry-run] FROM TO
#
# FROM is a folder or gs://BUCKET/FOLDER. A set's manifest.json is copied last, so that a copy that was cut short is no
# set; the same command again goes on. It pays where a set is read more often than once from a store that is slow at
# random reads, and fits: training reads every epoch.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

dry=
case ${1:-} in
  "" | -h | --help) manual "$0"; exit 0 ;;
  --dry-run) dry=yes; shift ;;
esac
[ $# = 2 ] || fail "it takes FROM and TO (see bash launch/stage.sh --help)"
from=${1%/} to=${2%/}
[[ $to != *://* ]] || fail "TO is $to; it must be a folder of this machine"

room() { # kilobytes needed, kilobytes free
  [ "$1" -le "$2" ] || fail "$from has $(($1 / 1024)) MiB, the disk of $to has $(($2 / 1024)) MiB left; read it where it lies"
}
run mkdir -p "$to"
free=0
[ -n "$dry" ] || free=$(df -kP "$to" | awk 'NR == 2 { print $4 }')
if [[ $from == gs://* ]]; then
  copy=(gcloud storage rsync --recursive)
  if [ -n "$dry" ]; then
    run gcloud storage du --summarize "$from"
  else
    size=$(run gcloud storage du --summarize "$from")
    size=$(awk 'END { print int($1 / 1024) }' <<<"$size")
    have=$(du -sk "$to" | cut -f 1)
    room "$size" "$((free + have))"
  fi
  run "${copy[@]}" '--exclude=(^|.*/)manifest\.json$' "$from" "$to"
  run "${copy[@]}" "$from" "$to"
else
  [ -d "$from" ] || fail "there is no folder $from"
  [ -n "$dry" ] || room "$(du -sk "$from" | cut -f 1)" "$((free + $(du -sk "$to" | cut -f 1)))"
  run rsync --archive --exclude=manifest.json "$from/" "$to/"
  run rsync --archive "$from/" "$to/"
fi
