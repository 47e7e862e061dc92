#!/bin/sh
# Runs a command that survives the end of the connection that started it. The first call with a NAME starts the command,
# later calls attach to it. Every call shows its output and exits with its status.
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
