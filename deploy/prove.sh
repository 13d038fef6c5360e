#!/usr/bin/env bash
# What `make prove` runs: an hour of proof that `make test` has no time for. Each step prints its verdict; the last lines
# sum them up. Takes the whole machine: nothing else should run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=.venv/bin
chaos=("$bin/baton" chaos --set engine.dtype=float32 --set engine.max_model_len=4096)
# The only decode worker is left alone: while it is away its clients get 503, which is no fault of the system.
spare=(--roles scheduler,prefill,front_proxy)
verdicts=()

step() {
    local name="$1" began=$SECONDS
    shift
    echo "== $name: $*"
    if "$@"; then verdicts+=("held    $name ($((SECONDS - began)) s)"); else verdicts+=("BROKEN  $name ($((SECONDS - began)) s)"); fi
}

step "20,000 seeds, five of six with accounts" "$bin/python" -m simulation --seeds 20000
step "5,000 seeds of expert rollouts" "$bin/python" -m simulation experts --seeds 5000
every=(--faults kill,freeze,terminate,restart,cut,delay,blackhole)
step "48 seeds of chaos in virtual time" "$bin/baton" chaos virtual --seeds 48 "${every[@]}"
step "8 seeds of it with a second prefill worker" "$bin/baton" chaos virtual --seeds 8 --prefill 2 "${every[@]}"
step "8 seeds of it with two schedulers" "$bin/baton" chaos virtual --seeds 8 --schedulers 2 "${every[@]}"
step "an hour at three times the capacity" "$bin/python" -m simulation overload --hours 1 --load 3
step "real engines, 1 prefill 2 decode: kill, cut" "${chaos[@]}" --prefill 1 --decode 2 --faults kill,cut --seed 3
step "real engines, 1 prefill 2 decode: freeze, restart" "${chaos[@]}" --prefill 1 --decode 2 --faults freeze,restart --seed 5
step "real engines, 2 prefill 1 decode: kill, cut" "${chaos[@]}" --prefill 2 --decode 1 "${spare[@]}" --faults kill,cut --seed 7
step "real engines, 2 prefill 1 decode: freeze, restart" "${chaos[@]}" --prefill 2 --decode 1 "${spare[@]}" --faults freeze,restart --seed 9
step "what takes minutes: accounts under chaos, a key that may appear nowhere, Ray with real engines" "$bin/python" -m pytest -q --suite=long
step "overhead beside plain vLLM and vllm-router" "$bin/python" -m bench overhead --rounds 4

printf '%s\n' "" "== proved" "${verdicts[@]}"
[[ "${verdicts[*]}" != *BROKEN* ]]
