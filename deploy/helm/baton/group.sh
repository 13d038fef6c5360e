#!/bin/bash
# One worker over the pods of a group; $1: its role. All its processes have one name and one epoch: the first pod makes the
# epoch when it starts and tells it, the others ask. A pod that starts again makes a new group, and so a new epoch.
set -eu

port=29502
folder="${TMPDIR:-/tmp}/group"
settings=(
    --config=/etc/baton/config.json
    --set="engine.args.nnodes=$LWS_GROUP_SIZE"
    --set="engine.args.node_rank=$LWS_WORKER_INDEX"
    --set="engine.args.master_addr=$LWS_LEADER_ADDRESS"
    --set=engine.args.master_port=29501
    --set=engine.args.distributed_executor_backend=mp
)
# The first pod's name.
export BATON_WORKER__WORKER_ID="${LWS_LEADER_ADDRESS%%.*}"
export VLLM_HOST_IP="$POD_IP"

if [ "$LWS_WORKER_INDEX" = 0 ]; then
    BATON_EPOCH="$(date +%s%3N)"
    export BATON_EPOCH
    mkdir -p "$folder"
    echo "$BATON_EPOCH" >"$folder/epoch"
    python3 -m http.server "$port" --directory "$folder" >/dev/null 2>&1 &
    exec baton "$1" "${settings[@]}"
fi
BATON_EPOCH="$(curl --fail --silent --max-time 5 --retry 600 --retry-delay 1 --retry-max-time 600 --retry-all-errors \
    "http://$LWS_LEADER_ADDRESS:$port/epoch")"
export BATON_EPOCH
exec baton engine-node "${settings[@]}"
