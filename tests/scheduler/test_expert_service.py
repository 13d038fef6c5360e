"""Ranks over real gRPC: the production session of each rank, a stand-in for its engine, and what commands ask."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from engine import expert_wire
from engine.expert_map import Array, ExpertMap
from engine.expert_rank import Command, ExpertRank, RankReport, Stage
from engine.vllm.experts.session import RankFacts, RankSession
from protos.experts.v1 import experts_pb2 as pb
from runtime.rpc.grpc_server import start_server
from runtime.timing.clock import SystemClock
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore
from scheduler.expert_metrics import ExpertMetrics
from scheduler.expert_service import ExpertService
from scheduler.experts import groups
from scheduler.metrics import SchedulerMetrics
from scheduler.operator_client import change_experts, show_experts
from scheduler.shell import SchedulerShell

WAIT_S = 10.0
START = ExpertMap.shared(4, np.array([[[0, 1, 2], [3, 0, 1]]]))
OTHER = ExpertMap.shared(4, np.array([[[0, 3, 2], [3, 2, 1]]]))


class Engines:
    """The engines of a group: all ranks meet as soon as all are armed."""

    def __init__(self, ranks: int) -> None:
        self.ranks = [EngineRank(self) for _ in range(ranks)]

    def meet(self) -> None:
        reduced = [min(numbers) for numbers in zip(*(one.machine.vote() for one in self.ranks), strict=True)]
        for one in self.ranks:
            if (placed := one.machine.agreed(reduced)) is not None:
                one.live = placed
                one.machine.applied(placed.digest)
                one.on_change()


class EngineRank:
    """What a LivePlacement is to the session."""

    def __init__(self, engines: Engines) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.apply_s, self.live = 0.002, START
        self.machine = ExpertRank(5, START.digest, slots_shape=(1, 2, 3), experts=4)
        self.waiting: list[tuple[int, Array]] = []
        self._engines = engines

    def handle(self, command: Command) -> None:
        self.machine.handle(command)
        self._engines.meet()

    def refuse(self, why: str) -> None:
        self.machine.refuse(why)

    def report(self) -> RankReport:
        return self.machine.report()

    def maps(self) -> tuple[ExpertMap, ExpertMap | None]:
        return self.live, self.machine.staged

    def take_counts(self) -> tuple[int, Array]:
        return self.waiting.pop() if self.waiting else (0, np.zeros((1, 4), np.int64))


class Setting:
    """A scheduler that listens, and what runs against it."""

    def __init__(self, address: str, shell: SchedulerShell) -> None:
        self.address = address
        self.shell = shell
        self.engines = Engines(2)
        self.tasks: list[asyncio.Task[None]] = []

    def start(self, engines: Engines, **facts: Any) -> None:
        for rank, one in enumerate(engines.ranks):
            known = {"layers": 1, "experts": 4, "slots": 6, "expert_bytes": 8} | facts
            told = RankFacts(model="m", role="decode", worker_id="decode-0", epoch=5, rank=rank, ranks=2, **known)
            self.tasks.append(asyncio.create_task(RankSession(one, told, self.address).run()))  # type: ignore[arg-type]

    async def group(self) -> pb.Group | None:
        groups = (await show_experts(self.address, timeout_s=WAIT_S)).groups
        return groups[0] if groups else None

    async def until(self, wanted: Any) -> pb.Group:
        async with asyncio.timeout(WAIT_S):
            while (found := await self.group()) is None or not wanted(found):
                await asyncio.sleep(0.02)
            return found

    async def change(self, **what: Any) -> pb.ChangeGroupResponse:
        return await change_experts(
            self.address, pb.ChangeGroupRequest(worker_id="decode-0", **what), timeout_s=WAIT_S
        )  # fmt: skip


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[Setting]:
    config, registry = SchedulerParameters(), CollectorRegistry()
    shell = SchedulerShell(config, SchedulerCore(config), SystemClock(), SchedulerMetrics(registry))
    experts = ExpertService(shell, SystemClock(), ExpertMetrics(registry))
    server = await start_server("127.0.0.1", 0, lambda it: (experts.add_to(it),), message_bytes_max=1 << 24)
    setting = Setting(server.address, shell)
    try:
        yield setting
    finally:
        for task in setting.tasks:
            task.cancel()
        await asyncio.gather(*setting.tasks, return_exceptions=True)
        experts.close()
        await server.stop(1.0)
        assert not shell.broken.is_set()


def idle(group: pb.Group) -> bool:
    return group.phase == "idle" and len(group.live_digests) == 2


async def test_a_map_goes_live_on_every_rank_and_back() -> None:
    async with listening() as setting:
        setting.start(setting.engines)
        before = await setting.until(idle)
        assert list(before.live_digests) == [START.digest] * 2 and before.live_version == 0
        await setting.change(apply=expert_wire.map_message(OTHER))
        after = await setting.until(lambda group: idle(group) and group.live_version == 1)
        assert list(after.live_digests) == [OTHER.digest] * 2 and after.apply_ms == 2.0
        assert expert_wire.read_map(after.live).digest == OTHER.digest
        assert [each.digest for each in after.history] == [OTHER.digest]
        with pytest.raises(grpc.aio.AioRpcError, match="has had no other map"):
            await setting.change(rollback=True)


async def test_counts_of_every_rank_make_a_plan_that_can_be_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "LOOK_INTERVAL_S", 3.0)
    async with listening() as setting:
        for one in setting.engines.ranks:
            one.waiting.append((50_000, np.array([[20_000, 20_000, 140_000, 20_000]])))
        setting.start(setting.engines)
        await setting.until(lambda group: idle(group) and group.tokens > 90_000)
        planned = await setting.change(plan=True)
        assert planned.predicted.balance_after > planned.predicted.balance_before
        placed = expert_wire.read_map(planned.map)
        assert (placed.slots == 2).sum() == 2
        # The scheduler itself may have begun the same change by now.
        await setting.until(lambda group: idle(group) and group.live_version >= 1)


async def test_what_cannot_be_changed_is_a_sentence() -> None:
    async with listening() as setting:
        with pytest.raises(grpc.aio.AioRpcError, match="nothing to place"):
            await setting.change(plan=True)
        setting.start(setting.engines)
        await setting.until(idle)
        for what, told in (
            ({"plan": True}, "has routed no token yet"),
            ({"apply": expert_wire.map_message(ExpertMap.shared(2, np.array([[[0], [1]]])))}, "the map is"),
            (
                {"apply": pb.ExpertMap(experts=4, layers=1, ranks=2, slots=bytes(12), columns=bytes(12))},
                "layer 0: rank 0",
            ),
            ({}, "say plan, apply_best, apply or rollback"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=told) as refused:
                await setting.change(**what)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_engine_that_takes_no_map_is_shown_with_its_reason() -> None:
    async with listening() as setting:
        setting.start(setting.engines, placement_off="this vLLM is not known", layers=0, experts=0, slots=0)
        shown = await setting.until(lambda group: bool(group.placement_off))
        assert shown.placement_off == "this vLLM is not known"
        with pytest.raises(grpc.aio.AioRpcError, match="takes no placement: this vLLM is not known"):
            await setting.change(plan=True)


async def test_a_scheduler_that_stands_by_takes_no_rank() -> None:
    async with listening() as setting:
        setting.shell.stands_by = True
        setting.start(setting.engines)
        with pytest.raises(grpc.aio.AioRpcError, match="does not lead"):
            await setting.group()
        setting.shell.stands_by = False
        await setting.until(idle)


async def test_a_rank_that_stages_another_map_or_none_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening() as setting:
        odd = setting.engines.ranks[1]
        take = odd.handle

        def other_map(command: Command) -> None:
            take(msgspec.structs.replace(command, placed=START) if isinstance(command, Stage) else command)

        def no_map(command: Command) -> None:
            if not isinstance(command, Stage):
                take(command)

        setting.start(setting.engines)
        await setting.until(idle)
        monkeypatch.setattr("scheduler.experts.rollout.STAGE_TIMEOUT_S", 0.5)
        for number, (handle, why) in enumerate(((other_map, "staged another map"), (no_map, "did not follow")), 1):
            odd.handle = handle  # type: ignore[method-assign]
            await setting.change(apply=expert_wire.map_message(OTHER))
            after = await setting.until(lambda group, number=number: idle(group) and group.rollouts_ended == number)
            assert why in after.ended_why
            assert list(after.live_digests) == [START.digest] * 2 and after.live_version == 0
        odd.handle = take  # type: ignore[method-assign]
        await setting.change(apply=expert_wire.map_message(OTHER))
        after = await setting.until(lambda group: idle(group) and group.live_version > 0)
        assert list(after.live_digests) == [OTHER.digest] * 2
