"""`baton chaos`: a real cluster under traffic, and faults that hit one process after the other. Judges what is seen."""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import aiohttp
import msgspec

from chaos import faults, metrics
from chaos.clients import Clients
from chaos.cluster import LOOK_INTERVAL_S, ChaosCluster, ChaosError
from chaos.network import routes_to
from chaos.relay import Relays
from chaos.report import ChaosReport, FaultRecord
from chaos.requests import REQUEST_KINDS, RequestKind, Sizes, make_asks
from chaos.schedule import (
    ENDING_KINDS,
    NETWORK_KINDS,
    USERS,
    Fault,
    FaultKind,
    Lengths,
    may_repeat,
    schedule,
)
from chaos.traffic import Counts, Traffic
from chaos.usage import UsageFound, compare
from launcher.backend import ProcessSpec
from launcher.config import BatonConfig
from launcher.hosted.status import StatusLine
from simulation.faults.invariants import Invariant

PROMPTS = 36
SIZES = Sizes(prompt_tokens_max=400, output_tokens_max=64, vocabulary=range(10, 500))
REQUEST_TIMEOUT_S = 120.0
START_TIMEOUT_S = 600.0
SETTLE_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 60.0

Hit = Callable[[Fault, StatusLine], Awaitable[int]]
"""Performs a fault; how many connections it disturbed."""


class ChaosOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times are seconds. ``specs`` are the processes that ``up_arguments`` make."""

    state_dir: Path
    up_arguments: tuple[str, ...] = ()
    specs: tuple[ProcessSpec, ...] = ()
    seed: int = 0
    kinds: tuple[FaultKind, ...] = ("kill",)
    roles: tuple[str, ...] = ("scheduler", "prefill", "decode", "front_proxy")
    rounds: int = 1
    users: int = USERS
    request_kinds: tuple[RequestKind, ...] = REQUEST_KINDS
    lengths: Lengths = Lengths()
    config: BatonConfig = BatonConfig()
    recover_timeout_s: float = 240.0


def run(options: ChaosOptions, tell: Callable[[str], None]) -> ChaosReport:
    """Start a cluster, break it, judge. However it ends there is a report, and nothing it started is left running."""
    return asyncio.run(_Chaos(options, tell).run())


class _Chaos:
    def __init__(self, options: ChaosOptions, tell: Callable[[str], None]) -> None:
        self._options = options
        self._tell = tell
        # A front proxy is being replaced, and takes its connections with it.
        self._connections_break = False
        # What a report holds however early the run ends.
        self._counts = Counts()
        self._records: list[FaultRecord] = []
        self._broken: defaultdict[Invariant, list[str]] = defaultdict(list)

    async def run(self) -> ChaosReport:
        options = self._options
        try:
            routes, settings = routes_to(options.specs) if NETWORK_KINDS.intersection(options.kinds) else ([], [])
        except OSError as error:
            return self._failed(error)
        relays = Relays(routes)
        arguments = [*options.up_arguments, *(word for each in settings for word in ("--set", each))]
        cluster = ChaosCluster(options.state_dir, arguments, self._tell)
        report: ChaosReport | None = None
        try:
            await relays.start()
            model = await cluster.start(START_TIMEOUT_S, keys=options.config.auth.mode == "required")
            breaks = functools.partial(
                faults.hit, cluster, relays, options.lengths, restart_timeout_s=options.recover_timeout_s
            )
            report = await self._measure(cluster, breaks, model)
        except Exception as error:  # noqa: BLE001 - any error is the verdict, and is reported nowhere else
            report = self._failed(error)
            report = msgspec.structs.replace(report, not_back=await cluster.not_back())
        finally:
            exit_code = await cluster.stop(STOP_TIMEOUT_S)
            await relays.close()
        return msgspec.structs.replace(report, exit_code=exit_code, passed=report.passed and exit_code == 0)

    def _failed(self, error: Exception) -> ChaosReport:
        words = str(error) or "nothing more is known"
        said = words if isinstance(error, ChaosError) else f"{type(error).__name__}: {words}"
        return ChaosReport(seed=self._options.seed, passed=False, error=said, counts=self._counts, faults=self._records)

    async def _measure(self, cluster: ChaosCluster, hit: Hit, model: str) -> ChaosReport:
        options = self._options
        targets = [line.id for line in await cluster.status() if line.role in options.roles]
        planned = schedule(options.seed, targets, options.kinds, rounds=options.rounds)
        asks = make_asks(options.seed, options.request_kinds, count=PROMPTS, sizes=SIZES)
        # A connection a front proxy closed while it was idle must not look like a lost request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            clients = Clients(session, model=model, timeout_s=REQUEST_TIMEOUT_S, api_key=cluster.api_key)
            traffic = Traffic(clients, door=cluster.door(), asks=asks, may_repeat=lambda: self._connections_break)
            self._counts = traffic.counts
            self._tell(f"learning {len(asks)} answers of the undisturbed cluster, twice")
            await traffic.learn(options.users)
            for kind, count in traffic.counts.left_out.items():
                self._tell(f"{count} requests of kind {kind} are left out: their two answers differ")
            sending = asyncio.create_task(traffic.run(options.users))
            try:
                for fault in planned:
                    await self._break(cluster, hit, fault, traffic)
                await self._more_ended(traffic, options.users)
                traffic.stop()
                await sending
            finally:
                sending.cancel()
                await asyncio.wait({sending})
        await self._look_at_metrics(cluster)
        leases, blocks = await self._settled(cluster)
        usage = None if options.config.accounts.mode == "off" else await self._recorded(cluster, clients)
        return ChaosReport(
            seed=options.seed,
            passed=not (self._counts.failed or leases or blocks or self._broken),
            counts=self._counts,
            faults=self._records,
            leases_left=leases,
            blocks_left=blocks,
            usage=usage,
            broken=self._broken,
        )

    async def _look_at_metrics(self, cluster: ChaosCluster) -> None:
        """Whether any process says now what it may never say."""
        self._note(metrics.beyond_bounds(await metrics.look(cluster.record(), cluster.api_key), self._options.config))

    def _note(self, broken: Iterable[metrics.Broken]) -> None:
        for invariant, what in broken:
            self._broken[invariant].append(what)

    async def _settled(self, cluster: ChaosCluster) -> tuple[int, int]:
        """Leases and blocks still held when the bound after the traffic is over; what else is left is noted."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + SETTLE_TIMEOUT_S
        while True:
            lines = await cluster.status()
            left = list(metrics.left(await metrics.look(cluster.record(), cluster.api_key)))
            leases, blocks = sum(line.leases_held for line in lines), sum(line.kv_blocks_used for line in lines)
            if not (leases or blocks or left) or loop.time() > deadline_s:
                self._note(left)
                return leases, blocks
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _recorded(self, cluster: ChaosCluster, clients: Clients) -> UsageFound:
        """What was recorded when the bound after the traffic is over; what does not fit is noted."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + SETTLE_TIMEOUT_S
        while True:
            lines = (await cluster.command("usage", "export")).splitlines()
            found = compare([msgspec.json.decode(line) for line in lines], clients.seen, broken=clients.broken)
            if not found.wrong or loop.time() > deadline_s:
                break
            await asyncio.sleep(LOOK_INTERVAL_S)
        self._note((Invariant.BILLED, what) for what in found.wrong)
        try:
            await cluster.command("usage", "verify")
        except ChaosError as error:
            self._note([(Invariant.BILLED, str(error))])
        return found

    async def _break(self, cluster: ChaosCluster, hit: Hit, fault: Fault, traffic: Traffic) -> None:
        loop = asyncio.get_running_loop()
        await self._more_ended(traffic, fault.after_requests)
        before = msgspec.structs.replace(traffic.counts)
        line = await cluster.line(fault.process_id)
        self._connections_break = line.role == "front_proxy" and may_repeat(fault, line.id)
        self._tell(f"{fault.kind} {fault.process_id} (pid {line.pid})")
        began_s = loop.time()
        disturbed, recovered_after_s = 0, None
        try:
            disturbed = await hit(fault, line)
            await cluster.whole_again(
                fault.process_id,
                instead_of_pid=line.pid if fault.kind in ENDING_KINDS else None,
                timeout_s=self._options.recover_timeout_s,
            )
            recovered_after_s = round(loop.time() - began_s, 2)
            # Requests that were under way when it was hit show their end only now.
            await self._more_ended(traffic, self._options.users)
            await self._look_at_metrics(cluster)
        finally:
            record = FaultRecord(
                kind=fault.kind,
                process_id=fault.process_id,
                recovered_after_s=recovered_after_s,
                disturbed=disturbed,
                requests=traffic.counts.requests - before.requests,
                failed=traffic.counts.failed - before.failed,
                repeated=traffic.counts.repeated - before.repeated,
            )
            self._records.append(record)
        self._connections_break = False
        told = f", {disturbed} connections hit" if fault.kind in NETWORK_KINDS else ""
        self._tell(
            f"{fault.process_id} whole again after {recovered_after_s} s{told}: {record.requests} requests ended, "
            f"{record.failed} failed, {record.repeated} repeated by their client"
        )

    async def _more_ended(self, traffic: Traffic, requests: int) -> None:
        try:
            await traffic.more_ended(requests, REQUEST_TIMEOUT_S)
        except TimeoutError:
            raise ChaosError(f"not within {REQUEST_TIMEOUT_S:g} s: {requests} more requests have ended") from None
