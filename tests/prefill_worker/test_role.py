"""The prefill job: what it takes, and the hand-off it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kv_transfer.integrity.prompt_digest import prompt_digest
from prefill_worker.config import PrefillLimits, PrefillWorkerConfig
from prefill_worker.role import PrefillRole
from runtime.failures import FailureKind
from tests.support import workers
from tests.support.golden import GOLDEN, Options, check_script
from worker.leases import Count, FreeBlocks, KeepBlocks, LeaseAction
from worker.role import Refused, WorkerRequest

INFO = msgspec.structs.replace(workers.INFO, engine_id="prefill-0-7", kv_blocks_total=10)
REQUEST = workers.asking("prefill")
# As the engine gives it out: what the role puts in is missing.
HANDOFF = workers.handoff(
    worker_id="", epoch=0, engine_id="", layout_fingerprint="", blocks=0, bytes=0, lease_remaining_s=60.0,
    connector_params=b"x",
)  # fmt: skip


def asking(**fields: Any) -> WorkerRequest:
    return workers.asking("prefill", **fields)


def role(**settings: float) -> PrefillRole:
    # A field that a struct does not have is ignored by it.
    config, limits = msgspec.convert(settings, PrefillWorkerConfig), msgspec.convert(settings, PrefillLimits)
    return PrefillRole(config, INFO, "prefill-0", limits)


def test_the_hand_off_says_whose_it_is_and_how_long_it_lasts() -> None:
    prefill = role(lease_s=30.0)
    handoff = prefill.offer(HANDOFF, REQUEST, 1, 100.0)[0]
    assert (handoff.worker_id, handoff.epoch, handoff.engine_id) == ("prefill-0", 7, "prefill-0-7")
    assert (handoff.layout_fingerprint, handoff.blocks, handoff.bytes) == ("f", 3, 300)
    assert (handoff.lease_remaining_s, handoff.connector_params) == (30.0, b"x")
    assert (len(prefill.leases), prefill.leases.blocks) == (1, 3)


def shown(action: LeaseAction) -> str:
    match action:
        case FreeBlocks(lease_id=lease_id):
            return f"free {lease_id}"
        case KeepBlocks(lease_id=lease_id, lease_s=lease_s):
            return f"keep {lease_id} for {lease_s:g}"
        case Count(what=what):
            return what


def test_leases_live_and_end_as_written() -> None:
    prefill = role(lease_s=30.0, lease_total_max_s=70.0)

    def step(verb: str, names: list[str], options: Options) -> list[str]:
        name, epoch, now_s = "".join(names), options.get("epoch", 7), float(options.get("at", 0))
        actions: Sequence[LeaseAction]
        match verb:
            case "offer":
                held = msgspec.structs.replace(HANDOFF, lease_id=name, lease_remaining_s=options.get("engine", 60))
                handoff, actions = prefill.offer(held, REQUEST, options["owner"], now_s)
                return [f"{shown(action)} for {handoff.lease_remaining_s:g}" for action in actions]
            case "renew":
                actions = prefill.renewed(name, epoch, now_s)
            case "stream":
                actions = prefill.leases.owner_gone(int(name))
            case "tick":
                actions = prefill.leases.tick(now_s)
            case "engine_gone":
                actions = prefill.leases.holder_gone()
            case _:
                actions = prefill.released(name, epoch, pulled=verb == "pulled")
        return [shown(action) for action in actions]

    check_script(GOLDEN / "leases.txt", step)


def test_the_hand_off_is_tied_to_the_tokens_it_covers_to_the_salt_and_to_the_model() -> None:
    salted = asking(token_ids=list(range(40)), cache_salt="tenant")
    handoff = role().offer(HANDOFF, salted, 1, 0.0)[0]
    assert handoff.prompt_digest == prompt_digest(list(range(33)), cache_salt="tenant", model="m")


def test_what_it_cannot_do_is_refused_with_the_reason() -> None:
    prefill = role(leases_max=1)
    prefill.offer(HANDOFF, REQUEST, 1, 0.0)
    refused = [prefill.accept(request) for request in (REQUEST, asking(request_id="other"))]
    assert [(r.failure.kind, r.reason) for r in refused if isinstance(r, Refused)] == [
        (FailureKind.BAD_REQUEST, "request_id"),
        (FailureKind.EXHAUSTED, "leases_max"),
    ]
