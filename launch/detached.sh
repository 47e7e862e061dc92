#!/bin/sh
# A command that outlives the connection it was started by. The first call under a NAME starts it, later ones follow it;
# every call shows its output and ends with its status.
#
#   sh launch/detached.sh NAME COMMAND ...
set -eu
run=.detached/$1
shift

mkdir -p .detached
if mkdir "$run" 2>/dev/null; then
  : >"$run/log"
  # shellcheck disable=SC2016 # expanded by the inner shell
  setsid sh -c 'run=$0; "$@" >"$run/log" 2>&1 & echo $! >"$run/pid"; wait $!; echo $? >"$run/status"' "$run" "$@" \
    </dev/null >/dev/null 2>&1 &
fi
until [ -s "$run/pid" ]; do sleep 1; done
tail -n +1 -f --pid="$(cat "$run/pid")" "$run/log"
until [ -s "$run/status" ]; do sleep 1; done
exit "$(cat "$run/status")"
