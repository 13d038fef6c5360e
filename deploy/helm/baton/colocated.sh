#!/bin/bash
# A prefill and a decode worker in one container: CUDA IPC, and with it NVLink, does not cross PID namespaces. Each gets half
# of the GPUs. The end of either is the end of both; a stop signal goes to both.
set -u

gpus="${BATON_GPUS_OF_EACH:-0}"
stopping="" prefill="" decode=""

stop() { # both, or the one that is there
    stopping=1
    # shellcheck disable=SC2086 # an empty one is no argument
    kill -TERM $prefill $decode 2>/dev/null
}
# Before anything is started: the first process of a container ignores signals that it does not expect.
trap stop TERM INT

devices() { # $1: the first of them
    seq -s, "$1" $(($1 + gpus - 1))
}

start() { # $1: role; $2: how far its ports are from the first worker's; $3: its first GPU
    if [ "$gpus" -gt 0 ]; then export CUDA_VISIBLE_DEVICES="$(devices "$3")"; fi
    BATON_WORKER__WORKER_ID="$POD_NAME-$1" BATON_WORKER__PORT=$((7100 + $2)) BATON_WORKER__METRICS_PORT=$((9100 + $2)) \
        exec baton "$1" --config /etc/baton/config.json
}

start prefill 0 0 &
prefill=$!
start decode 1 "$gpus" &
decode=$!
[ -n "$stopping" ] && stop

runs() { kill -0 "$1" 2>/dev/null; }
# `wait -n` passes over one that ended before it was called, so it is called again and again, with a clock beside.
while [ -z "$stopping" ] && runs "$prefill" && runs "$decode"; do
    sleep 2 >/dev/null 2>&1 &
    wait -n "$prefill" "$decode" $!
done
if [ -n "$stopping" ]; then
    wait "$prefill" "$decode"
    exit 0
fi
ended="$decode"
runs "$prefill" || ended="$prefill"
wait "$ended"
code=$?
kill -TERM "$prefill" "$decode" 2>/dev/null
wait "$prefill" "$decode"
# One that ends without being told to has failed, whatever its code.
exit $((code > 0 ? code : 1))
