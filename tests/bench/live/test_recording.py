"""What a scheduler was told is kept, and read again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.live.planners import ByTenant, planner_of
from bench.live.real_routing import alike, hits
from bench.live.recording import Header, RecordedCore, decided_again, read
from kv_transfer.prefix import block_keys
from kv_transfer.prefix.events import BlockDelta, Medium
from scheduler.api.events import (
    FrontJoined,
    PlanRequested,
    RequestEnded,
    Tick,
    WorkerBlocksReported,
    WorkerJoined,
    WorkerLoadReported,
    WorkerProgressReported,
)
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.api.worker_progress import EngineStep
from scheduler.cluster.latency_profile import LatencyProfile
from scheduler.config import SchedulerParameters

KEYS = block_keys.pack_keys(range(1, 9))


def info(session: int) -> WorkerInfo:
    role = "decode" if session == 4 else "prefill"
    return WorkerInfo(
        worker_id=f"{role}-{session}",
        role=role,  # type: ignore[arg-type]
        address=f"127.0.0.1:{session}",
        epoch=1,
        model="demo",
        layout_fingerprint="f",
        block_size_tokens=32,
        block_bytes=65536,
        kv_blocks_total=1000,
        engine_version="fake",
        requests_max=64,
    )


def record(file: Path, requests: int = 60) -> None:
    """A day at a scheduler: three workers, blocks on one of them, requests of three tenants."""
    with file.open("wb") as out:
        header = Header(seed=7, began_s=1.0, config=SchedulerParameters(), profile=LatencyProfile())
        core = RecordedCore(header, ByTenant, out)
        core.handle(FrontJoined(session=1, front_proxy_id="front"), 1.0)
        for session in (2, 3, 4):
            worker = info(session)
            core.handle(WorkerJoined(session=session, info=worker), 1.5)
            steps = (EngineStep(0.05, 400, 80_000), EngineStep(0.01, 0, 0, 3, 900))
            core.handle(WorkerProgressReported(session=session, worker_id=worker.worker_id, steps=steps), 1.6)
            load = WorkerLoad(state=WorkerState.READY)
            core.handle(WorkerLoadReported(session=session, worker_id=worker.worker_id, load=load), 1.7)
        for session in (2, 3):
            delta = BlockDelta(epoch=1, seq=1, levels={Medium.HBM: KEYS} if session == 3 else {}, reset=True)
            core.handle(WorkerBlocksReported(session=session, worker_id=f"prefill-{session}", delta=delta), 1.8)
        rng = random.Random(1)
        for plan_id in range(requests):
            now_s = 5.0 + 0.1 * plan_id
            # As a front proxy passes on what a client says.
            tenant = ("name-baton", "name-round_robin", "name-least_load")[plan_id % 3]
            core.handle(
                PlanRequested(
                    session=1,
                    plan_id=plan_id,
                    request_id=str(plan_id),
                    prompt_tokens=256 + rng.randrange(256),
                    output_tokens_max=16,
                    tenant=tenant,
                    block_keys=KEYS if plan_id % 2 else b"",
                    excluded_worker_ids=frozenset({"prefill-9"}),
                ),
                now_s,
            )
            ended = RequestEnded(session=1, plan_id=plan_id, outcome="finished", output_tokens=16, cached_tokens=32)
            core.handle(ended, now_s + 0.05)
            for session in (2, 3, 4):
                load = WorkerLoad(state=WorkerState.READY, kv_blocks_used=plan_id % 3)
                core.handle(WorkerLoadReported(session=session, worker_id=info(session).worker_id, load=load), now_s)
        core.handle(Tick(), 100.0)


def test_a_core_that_is_told_the_same_decides_the_same(tmp_path: Path) -> None:
    record(tmp_path / "recording")
    assert alike(tmp_path / "recording") == (60, 60)


def test_another_seed_is_another_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "recording"
    record(file)
    text = file.read_text()
    assert '"seed":7' in text
    file.write_text(text.replace('"seed":7', '"seed":8'))
    count, same = alike(file)
    assert count == 60
    assert same < count


def test_each_tenant_has_its_planner(tmp_path: Path) -> None:
    file = tmp_path / "recording"
    record(file)
    chosen: dict[str, list[str]] = {}
    for entry, _ in decided_again(file, ByTenant):
        if isinstance(entry.event, PlanRequested):
            told = planner_of(entry.event.tenant) + (" keys" if entry.event.block_keys else "")
            chosen.setdefault(told, []).extend(each.prefill for each in entry.decisions)
    assert {*chosen["round_robin"], *chosen["round_robin keys"]} == {"prefill-2", "prefill-3"}
    assert {*chosen["least_load"], *chosen["least_load keys"]} == {"prefill-2", "prefill-3"}
    # It knows where the blocks are.
    assert set(chosen["baton keys"]) == {"prefill-3"}


def test_hits_are_counted_by_tenant(tmp_path: Path) -> None:
    record(tmp_path / "recording")
    assert hits(tmp_path / "recording", 2.0) == {"baton": 640, "round_robin": 640, "least_load": 640}
    assert hits(tmp_path / "recording", 8.0) != hits(tmp_path / "recording", 2.0)


@pytest.mark.parametrize("cut", [1, 20])
def test_a_last_line_that_is_not_whole_is_left_out(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "recording"
    record(file, requests=2)
    whole = len(list(read(file)[1]))
    file.write_bytes(file.read_bytes()[:-cut])
    assert len(list(read(file)[1])) == whole - 1
