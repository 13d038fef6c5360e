"""Ranks of a worker are planned for one by one; its stream, life, role and health stay those of the worker."""

from __future__ import annotations

import random

from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import BlockDelta, Medium
from protos.scheduler.v1 import scheduler_pb2 as pb
from scheduler import wire
from scheduler.api.actions import Placement, ReplyPlan, ReplyRefusal
from scheduler.api.events import (
    DrainRequested,
    FrontJoined,
    PlansRunning,
    RequestEnded,
    RunningPlan,
    WorkerBlocksReported,
    WorkerJoined,
    WorkerLeft,
    WorkerProgressReported,
    WorkerSuspected,
)
from scheduler.api.worker_info import WorkerLoad, WorkerState
from scheduler.api.worker_progress import EngineStep
from scheduler.cluster.worker_group import WorkerGroup
from tests.scheduler.cast import BLOCK_TOKENS, FRONT, Stage, question, ready, worker_info

TOKENS = 4 * BLOCK_TOKENS + 1


def keys(seed: int) -> bytes:
    rng = random.Random(seed)
    return block_keys.prompt_keys([rng.randrange(1000) for _ in range(TOKENS)], BLOCK_TOKENS)


def rank_load(**changes: int) -> WorkerLoad:
    return ready(**changes)


def group(*, taught: bool = True, ranks: int = 2) -> Stage:
    """One decode worker with ranks of 50 blocks each, that has shown how fast it is."""
    stage = Stage()
    stage.enter("d0", ranks=ranks, kv_blocks_total=50 * ranks)
    report(stage)
    if taught:
        steps = tuple(EngineStep(0.1 + 0.001 * n, 100 + n, 5000, 0, 0) for n in range(8))
        stage.do(WorkerProgressReported(session=session(stage), worker_id="d0", steps=steps))
    return stage


def session(stage: Stage) -> int:
    return stage.core.cluster.workers["d0"].session


def report(stage: Stage, *loads: WorkerLoad) -> None:
    stage.now_s += 1.0
    parts = loads or (rank_load(), rank_load())
    running, used = sum(one.requests_running for one in parts), sum(one.kv_blocks_used for one in parts)
    queued = sum(one.prefill_tokens_queued for one in parts)
    whole = ready(requests_running=running, kv_blocks_used=used, prefill_tokens_queued=queued, ranks=parts)
    stage.report("d0", whole)


def ask(stage: Stage, plan_id: int, **changes: object) -> ReplyPlan | ReplyRefusal:
    fields = {"prompt_tokens": TOKENS, **changes}
    (reply,) = stage.do(question(plan_id, **fields))
    assert isinstance(reply, ReplyPlan | ReplyRefusal)
    return reply


def rank_of(stage: Stage, plan_id: int, **changes: object) -> int | None:
    reply = ask(stage, plan_id, **changes)
    assert isinstance(reply, ReplyPlan) and reply.decode is not None, reply
    return reply.decode.rank


def end(stage: Stage, *plan_ids: int) -> None:
    for plan_id in plan_ids:
        stage.do(RequestEnded(session=FRONT, plan_id=plan_id, outcome="finished", output_tokens=1))


def tell(stage: Stage, rank: int, held: bytes, seq: int = 1) -> None:
    delta = BlockDelta(epoch=1, rank=rank, seq=seq, levels={Medium.HBM: held}, reset=seq == 1)
    stage.do(WorkerBlocksReported(session=session(stage), worker_id="d0", delta=delta))


def test_a_plan_names_the_rank_that_told_of_the_prefix() -> None:
    for holder in (0, 1):
        stage = group()
        for rank in (0, 1):
            tell(stage, rank, keys(1) if rank == holder else keys(2))
        assert rank_of(stage, 1, block_keys=keys(1)) == holder
        end(stage, 1)
        assert rank_of(stage, 2, block_keys=keys(2)) == 1 - holder


def test_a_rank_without_events_is_taken_to_hold_what_was_sent_there() -> None:
    stage = group()
    # Not both are computed on one rank; each comes back to its own.
    first, second = rank_of(stage, 1, block_keys=keys(1)), rank_of(stage, 2, block_keys=keys(2))
    assert {first, second} == {0, 1}
    end(stage, 1, 2)
    report(stage)
    assert [rank_of(stage, 3, block_keys=keys(2)), rank_of(stage, 4, block_keys=keys(1))] == [second, first]


def test_the_rank_with_the_shorter_queue_gets_a_prompt_that_none_holds() -> None:
    for busy in (0, 1):
        stage = group()
        report(stage, *[rank_load(prefill_tokens_queued=5000 if rank == busy else 0) for rank in (0, 1)])
        assert rank_of(stage, 1, block_keys=keys(1)) == 1 - busy


def test_kv_that_is_full_on_one_rank_leaves_the_other() -> None:
    stage = group()
    report(stage, rank_load(kv_blocks_used=50), rank_load(kv_blocks_used=10))
    tell(stage, 0, keys(1))
    assert [rank_of(stage, plan_id, block_keys=keys(1)) for plan_id in range(1, 6)] == [1] * 5
    report(stage, rank_load(kv_blocks_used=50), rank_load(kv_blocks_used=50))
    (waits,) = stage.do(question(9, prompt_tokens=TOKENS))
    assert not isinstance(waits, ReplyPlan), "no rank has room, though a half of the blocks would do"
    fits_nowhere = ask(stage, 10, prompt_tokens=60 * BLOCK_TOKENS)
    assert isinstance(fits_nowhere, ReplyRefusal) and fits_nowhere.cause == "too_large"


def test_blocks_are_reserved_on_the_rank_and_go_with_its_worker() -> None:
    stage = group()
    rank = rank_of(stage, 1)
    member = stage.core.cluster.workers["d0"]
    assert isinstance(member, WorkerGroup) and rank is not None
    assert [bool(one.reserved_blocks) for one in member.ranks] == [at == rank for at in (0, 1)]
    tell(stage, 0, keys(1))
    tell(stage, 1, keys(2))
    assert len(stage.core.prefixes.held_tokens(keys(2), BLOCK_TOKENS, TOKENS)) == 1
    # A gap on one rank: its blocks alone leave the index.
    tell(stage, 0, keys(3), seq=7)
    assert not stage.core.prefixes.held_tokens(keys(1), BLOCK_TOKENS, TOKENS)
    assert stage.core.prefixes.held_tokens(keys(2), BLOCK_TOKENS, TOKENS)[0][1] == ("d0#1",)
    stage.do(WorkerLeft(session=member.session, worker_id="d0", reason="died"))
    assert not stage.core.prefixes.held_tokens(keys(2), BLOCK_TOKENS, TOKENS)
    assert not stage.core.prefixes.feed.targets
    # A stranger's rank is not heard.
    stage.enter("d0", epoch=2, ranks=4, kv_blocks_total=200)
    tell(stage, 9, keys(1))
    assert len(stage.core.prefixes.feed.targets) == 4


def test_a_restart_with_fewer_ranks_leaves_none_behind() -> None:
    stage = group(ranks=4)
    stage.do(WorkerJoined(session=77, info=worker_info("d0", epoch=2)))
    assert set(stage.core.prefixes.feed.targets.values()) == {"d0"}
    stage.report("d0")
    assert rank_of(stage, 1) is None, "a worker with one rank is not told which"


def test_what_concerns_the_process_concerns_all_its_ranks() -> None:
    stage = group()
    stage.do(WorkerSuspected(worker_id="d0", epoch=1, reason="it broke"))
    assert len({rank.suspect_until_s for rank in stage.core.cluster.workers["d0"].ranks}) == 1
    stage.do(DrainRequested(worker_id="d0"))
    assert not any(rank.ready for rank in stage.core.cluster.workers["d0"].ranks)
    assert stage.core.cluster.workers["d0"].state is WorkerState.DRAINING
    refused = ask(stage, 1)
    assert isinstance(refused, ReplyRefusal) and refused.cause == "no_worker"


def test_a_load_without_ranks_is_of_no_rank() -> None:
    stage = group()
    report(stage, rank_load(kv_blocks_used=50), rank_load(kv_blocks_used=50))
    # A front proxy that plans itself shows a worker that it must not use as one without a load.
    stage.report("d0", WorkerLoad())
    assert not any(rank.ready for rank in stage.core.cluster.workers["d0"].ranks)


def test_plans_of_a_former_scheduler_are_counted_on_their_ranks() -> None:
    stage = Stage()
    there = Placement("d0", "d0:1", 1, 0, 1)
    plan = RunningPlan(plan_id=5, request_id="r5", prefill=None, decode=there, decode_blocks=20)
    stage.do(PlansRunning(session=FRONT, plans=(plan,)))
    stage.enter("d0", ranks=2)
    assert [rank.reserved_blocks for rank in stage.core.cluster.workers["d0"].ranks] == [0, 20]
    # An old front proxy forgot the rank: then only what the worker reports counts.
    forgotten = RunningPlan(
        plan_id=6, request_id="r6", prefill=None, decode=Placement("d0", "d0:1", 1), decode_blocks=9
    )
    stage.do(FrontJoined(session=FRONT + 1, front_proxy_id="old"))
    stage.do(PlansRunning(session=FRONT + 1, plans=(forgotten,)))
    assert [rank.reserved_blocks for rank in stage.core.cluster.workers["d0"].ranks] == [0, 20]


def test_a_sibling_goes_to_the_rank_that_holds_the_prompt() -> None:
    stage = group()
    for rank in (0, 1):
        # Both tell of their blocks, and have not told of this prompt's yet.
        tell(stage, rank, keys(10 + rank))
    for holder in (1, 0):
        report(stage, *[rank_load(prefill_tokens_queued=0 if rank == holder else 5000) for rank in (0, 1)])
        first = ask(stage, 10 + holder, block_keys=keys(holder))
        assert isinstance(first, ReplyPlan) and first.decode is not None and first.decode.rank == holder
        for sibling in (20, 30):
            pinned = first.decode.target
            reply = ask(stage, sibling + holder, block_keys=keys(holder), pinned_decode_worker_id=pinned)
            assert isinstance(reply, ReplyPlan)
            assert (reply.reason, reply.decode) == ("pinned", first.decode)


def test_a_sibling_of_which_only_the_worker_is_known_goes_to_the_rank_that_told_of_the_prompt() -> None:
    stage = group()
    for holder in (1, 0):
        tell(stage, holder, keys(holder))
        reply = ask(stage, 10 + holder, block_keys=keys(holder), pinned_decode_worker_id="d0")
        assert isinstance(reply, ReplyPlan) and reply.decode is not None
        assert (reply.reason, reply.decode.rank) == ("pinned", holder)


def test_a_plan_says_its_rank_on_the_wire() -> None:
    stage = group()
    tell(stage, 1, keys(1))
    reply = ask(stage, 1, block_keys=keys(1))
    assert isinstance(reply, ReplyPlan)
    (told,) = wire.plan(reply).messages
    assert told.plan.decode.rank == 1 and wire._placed(told.plan.decode) == reply.decode
    assert not pb.Placement().HasField("rank")
    assert reply.explained is not None and reply.explained.options[0].decode == "d0#1"
