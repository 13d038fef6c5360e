"""`baton chaos`: a real cluster under traffic, and faults that hit one process after the other. Judges what is seen.

The same promises that the simulation checks over thousands of seeds are checked here on real processes: every request
ends once, its tokens are those of the undisturbed run, and when the traffic is over nothing is held.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp
import msgspec
import psutil

from launcher import state, status
from launcher.chaos_schedule import Fault, FaultKind, Target, schedule
from launcher.chaos_traffic import Counts, Traffic, make_prompts

_POLL_S = 0.2
_READY = "ready http://"


class ChaosError(Exception):
    """The cluster did not come up, or did not become whole again; the message says what was missing."""


class ChaosOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Times are seconds."""

    state_dir: Path
    up_arguments: tuple[str, ...] = ()
    seed: int = 0
    kinds: tuple[FaultKind, ...] = ("kill",)
    roles: tuple[str, ...] = ("scheduler", "prefill", "decode", "front_proxy")
    rounds: int = 1
    users: int = 6
    prompts: int = 24
    prompt_tokens_max: int = 400
    output_tokens_max: int = 64
    freeze_s: float = 20.0
    after_requests_max: int = 8
    request_timeout_s: float = 120.0
    start_timeout_s: float = 600.0
    recover_timeout_s: float = 240.0
    settle_timeout_s: float = 10.0
    stop_timeout_s: float = 60.0


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One fault and what the traffic saw while it lasted."""

    kind: FaultKind
    process_id: str
    recovered_after_s: float
    requests: int
    failed: int
    repeated: int


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict and everything it rests on."""

    seed: int
    passed: bool
    counts: Counts
    faults: list[FaultRecord]
    leases_left: int
    blocks_left: int
    exit_code: int


def run(options: ChaosOptions, tell: Callable[[str], None]) -> ChaosReport:
    """Start a cluster, break it, judge. Raises ChaosError; nothing it started is left running."""
    return asyncio.run(_Chaos(options, tell).run())


class _Chaos:
    def __init__(self, options: ChaosOptions, tell: Callable[[str], None]) -> None:
        self._options = options
        self._tell = tell
        self._front_proxy_down = False
        self._frozen: list[psutil.Process] = []

    async def run(self) -> ChaosReport:
        launcher = await self._start()
        pump: asyncio.Task[None] | None = None
        try:
            model = await self._ready(launcher)
            assert launcher.stdout is not None
            pump = asyncio.create_task(_pass_on(launcher.stdout, self._tell))
            report = await self._measure(model)
        finally:
            self._thaw()
            exit_code = await self._stop(launcher)
            if pump is not None:
                await pump
        passed = report.passed and exit_code == 0
        return msgspec.structs.replace(report, exit_code=exit_code, passed=passed)

    async def _measure(self, model: str) -> ChaosReport:
        options = self._options
        lines = await self._status()
        targets = [Target(line.id, line.role) for line in lines if line.role in options.roles]  # type: ignore[arg-type]
        faults = schedule(
            options.seed, targets, options.kinds, rounds=options.rounds, after_requests_max=options.after_requests_max
        )
        prompts = make_prompts(
            options.seed, count=options.prompts, tokens_max=options.prompt_tokens_max,
            output_tokens_max=options.output_tokens_max, vocabulary=range(10, 500),
        )  # fmt: skip
        urls = [f"http://{line.address}" for line in lines if line.role == "front_proxy"]
        timeout = aiohttp.ClientTimeout(total=options.request_timeout_s)
        # A connection a front proxy closed while it was idle must not look like a lost request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            traffic = Traffic(
                session, model=model, urls=urls, prompts=prompts, may_repeat=lambda: self._front_proxy_down
            )
            self._tell(f"learning {len(prompts)} answers of the undisturbed cluster")
            await traffic.learn(options.users)
            sending = asyncio.create_task(traffic.run(options.users))
            try:
                records = [await self._break(fault, traffic) for fault in faults]
                await traffic.more_ended(options.users, options.request_timeout_s)
            finally:
                traffic.stop()
                await sending
        leases, blocks = await self._settled()
        return ChaosReport(
            seed=options.seed,
            passed=not (traffic.counts.failed or leases or blocks),
            counts=traffic.counts,
            faults=records,
            leases_left=leases,
            blocks_left=blocks,
            exit_code=0,
        )

    # Faults

    async def _break(self, fault: Fault, traffic: Traffic) -> FaultRecord:
        loop = asyncio.get_running_loop()
        await traffic.more_ended(fault.after_requests, self._options.request_timeout_s)
        before = msgspec.structs.replace(traffic.counts)
        self._front_proxy_down = fault.role == "front_proxy"
        line = await self._line(fault.process_id)
        self._tell(f"{fault.kind} {fault.process_id} (pid {line.pid})")
        began_s = loop.time()
        await self._hit(fault, line)
        await self._whole_again(fault, line)
        recovered_after_s = loop.time() - began_s
        # Requests that were under way when it was hit show their end only now.
        await traffic.more_ended(self._options.users, self._options.request_timeout_s)
        self._front_proxy_down = False
        counts = traffic.counts
        record = FaultRecord(
            kind=fault.kind,
            process_id=fault.process_id,
            recovered_after_s=round(recovered_after_s, 2),
            requests=counts.requests - before.requests,
            failed=counts.failed - before.failed,
            repeated=counts.repeated - before.repeated,
        )
        self._tell(
            f"{fault.process_id} whole again after {record.recovered_after_s} s: {record.requests} requests ended, "
            f"{record.failed} failed, {record.repeated} repeated by their client"
        )
        return record

    async def _hit(self, fault: Fault, line: status.StatusLine) -> None:
        match fault.kind:
            case "kill":
                os.kill(line.pid, signal.SIGKILL)
            case "terminate":
                os.kill(line.pid, signal.SIGTERM)
            case "restart":
                await self._restart(fault.process_id)
            case "freeze":
                root = psutil.Process(line.pid)
                self._frozen = [root, *root.children(recursive=True)]
                for process in self._frozen:
                    process.suspend()
                await _pause(self._options.freeze_s)
                self._thaw()

    def _thaw(self) -> None:
        for process in self._frozen:
            if process.is_running():
                process.resume()
        self._frozen = []

    async def _restart(self, process_id: str) -> None:
        argv = [
            sys.executable,
            "-m",
            "launcher.cli",
            "restart",
            process_id,
            "--state-dir",
            str(self._options.state_dir),
        ]
        process = await asyncio.create_subprocess_exec(*argv, stdout=sys.stderr, start_new_session=True)
        async with asyncio.timeout(self._options.recover_timeout_s):
            code = await process.wait()
        if code:
            raise ChaosError(f"`baton restart {process_id}` ended with {code}")

    async def _whole_again(self, fault: Fault, before: status.StatusLine) -> None:
        """Wait until the process that was hit serves again, and every other one too."""

        def whole(lines: Sequence[status.StatusLine]) -> bool:
            hit = next(line for line in lines if line.id == fault.process_id)
            anew = fault.kind == "freeze" or hit.pid != before.pid
            return anew and status.all_serve(lines)

        await self._until(whole, self._options.recover_timeout_s, f"{fault.process_id} is whole again")

    async def _settled(self) -> tuple[int, int]:
        """Leases and blocks still held when the bound after the traffic is over."""

        def nothing_held(lines: Sequence[status.StatusLine]) -> bool:
            return not any(line.leases_held or line.kv_blocks_used for line in lines)

        try:
            lines = await self._until(nothing_held, self._options.settle_timeout_s, "nothing is held")
        except ChaosError:
            lines = await self._status()
        return sum(line.leases_held for line in lines), sum(line.kv_blocks_used for line in lines)

    # The cluster

    async def _start(self) -> asyncio.subprocess.Process:
        self._options.state_dir.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "launcher.cli", "up", "--port", "0", "--grpc-port", "0"]
        argv += ["--state-dir", str(self._options.state_dir), *self._options.up_arguments]
        return await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, start_new_session=True)

    async def _ready(self, launcher: asyncio.subprocess.Process) -> str:
        """Wait for the cluster; the name of its model."""
        assert launcher.stdout is not None
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                while line := (await launcher.stdout.readline()).decode():
                    self._tell(line.rstrip())
                    if line.startswith(_READY):
                        break
                else:
                    raise ChaosError("`baton up` ended before it was ready")
                url = line.split()[1]
                async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
                    return str((await response.json())["data"][0]["id"])
        except TimeoutError:
            raise ChaosError(f"the cluster was not ready after {self._options.start_timeout_s:g} s") from None

    async def _stop(self, launcher: asyncio.subprocess.Process) -> int:
        if launcher.returncode is None:
            launcher.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(self._options.stop_timeout_s):
                return await launcher.wait()
        except TimeoutError:
            os.killpg(launcher.pid, signal.SIGKILL)
            return await launcher.wait()

    async def _status(self) -> list[status.StatusLine]:
        return await status.collect(state.read(self._options.state_dir), timeout_s=2.0)

    async def _line(self, process_id: str) -> status.StatusLine:
        return next(line for line in await self._status() if line.id == process_id)

    async def _until(
        self, condition: Callable[[Sequence[status.StatusLine]], bool], timeout_s: float, what: str
    ) -> Sequence[status.StatusLine]:
        """Other processes are asked again and again: nothing here hears of their changes."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while not condition(lines := await self._status()):
            if loop.time() > deadline_s:
                seen = ", ".join(f"{line.id} {line.state} {line.leases_held}/{line.kv_blocks_used}" for line in lines)
                raise ChaosError(f"not within {timeout_s:g} s: {what}; {seen}")
            await _pause(_POLL_S)
        return lines


async def _pass_on(stream: asyncio.StreamReader, tell: Callable[[str], None]) -> None:
    while line := await stream.readline():
        tell(line.decode().rstrip())


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)
