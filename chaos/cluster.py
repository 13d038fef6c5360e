"""The cluster that chaos breaks: a `baton up` of its own, started, asked and stopped. Breaks nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

import baton_llm
from chaos.clients import Door, headers_of
from chaos.report import NotBack
from launcher.hosted import state_file
from launcher.hosted.status import StatusLine, all_serve, collect
from launcher.local.child import tail

LOOK_INTERVAL_S = 0.2
STATUS_TIMEOUT_S = 2.0
_COMMAND_TIMEOUT_S = 60.0
_READY = "ready http"
_LOG_TAIL_LINES = 30
# Looks in a row that must find everything whole.
_LOOKS_WHOLE = 2
# A scheduler that stands by serves as well as it should.
_WELL = ("ready", "standby")


class ChaosError(Exception):
    """The cluster did not come up, or did not become whole again; the message says what was missing."""


class ChaosCluster:
    """One `baton up`. ``start``, ask, ``stop``."""

    def __init__(self, state_dir: Path, up_arguments: Sequence[str], tell: Callable[[str], None]) -> None:
        self.state_dir = state_dir
        self._up_arguments = up_arguments
        self._tell = tell
        self.api_key = ""
        """What clients show; empty: nothing is asked for."""
        self._launcher: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None

    async def start(self, timeout_s: float, *, keys: bool = False) -> str:
        """Start `baton up` and wait until it serves; the name of its model. Raises ChaosError.

        ``keys``: it asks for them, so clients are given one.
        """
        self.state_dir.mkdir(parents=True, exist_ok=True)
        argv = baton_llm.command("up", "--port", "0", "--grpc-port", "0", "--state-dir", str(self.state_dir))
        self._launcher = await asyncio.create_subprocess_exec(
            *argv, *self._up_arguments, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        stdout = self._launcher.stdout
        assert stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                while line := (await stdout.readline()).decode():
                    self._tell(line.rstrip())
                    if line.startswith(_READY):
                        break
                else:
                    raise ChaosError("`baton up` ended before it was ready")
                url = line.split()[1]
                if keys:
                    self.api_key = json.loads(await self.command("keys", "create", "--team", "chaos", "--json"))["key"]
                headers = headers_of(self.api_key)
                async with (
                    aiohttp.ClientSession() as session,
                    session.get(f"{url}/v1/models", headers=headers) as response,
                ):
                    model = str((await response.json())["data"][0]["id"])
        except TimeoutError:
            raise ChaosError(f"the cluster was not ready after {timeout_s:g} s") from None
        self._pump = asyncio.create_task(self._pass_on(stdout))
        return model

    async def stop(self, timeout_s: float) -> int:
        """Stop it as Ctrl-C does; its exit code."""
        launcher = self._launcher
        if launcher is None:
            return 0
        if launcher.returncode is None:
            # Not send_signal: it reaps a process that has just ended, and its exit code would be lost.
            with contextlib.suppress(ProcessLookupError):
                os.kill(launcher.pid, signal.SIGINT)
        try:
            async with asyncio.timeout(timeout_s):
                code = await launcher.wait()
        except TimeoutError:
            os.killpg(launcher.pid, signal.SIGKILL)
            code = await launcher.wait()
        if self._pump is not None:
            await self._pump
        return code

    async def command(self, *words: str) -> str:
        """What a `baton` command on it prints. Raises ChaosError when it fails or does not end in time."""
        argv = baton_llm.command(*words, "--state-dir", str(self.state_dir))
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True
        )
        try:
            async with asyncio.timeout(_COMMAND_TIMEOUT_S):
                said, errors = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise ChaosError(f"`baton {words[0]}` did not end within {_COMMAND_TIMEOUT_S:g} s") from None
        if process.returncode:
            raise ChaosError(f"`baton {words[0]}` ended with {process.returncode}: {(errors or said).decode()[-500:]}")
        return said.decode()

    async def restart(self, process_id: str, timeout_s: float) -> None:
        """`baton restart`. Raises ChaosError when it is refused or does not end in time."""
        argv = baton_llm.command("restart", process_id, "--state-dir", str(self.state_dir))
        process = await asyncio.create_subprocess_exec(*argv, stdout=sys.stderr, start_new_session=True)
        try:
            async with asyncio.timeout(timeout_s):
                code = await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise ChaosError(f"`baton restart {process_id}` did not end within {timeout_s:g} s") from None
        if code:
            raise ChaosError(f"`baton restart {process_id}` ended with {code}")

    def record(self) -> state_file.ClusterRecord:
        """What the launcher knows of every process now."""
        return state_file.read(self.state_dir)

    async def status(self) -> list[StatusLine]:
        """What every process says now."""
        return await collect(state_file.read(self.state_dir), timeout_s=STATUS_TIMEOUT_S)

    async def line(self, process_id: str) -> StatusLine:
        """What one process says now."""
        return next(line for line in await self.status() if line.id == process_id)

    def door(self) -> Door:
        """Where clients reach it: one address for all front proxies, which outlives them."""
        record = self.record()
        return Door(url=record.url, grpc_address=record.grpc_address)

    async def whole_again(self, process_id: str, *, instead_of_pid: int | None, timeout_s: float) -> None:
        """Wait until a process serves, under another pid where one is named, and every other one too.

        All have found the scheduler that leads again as well: a fault that hits while one has not is a second one at
        the same time. Raises ChaosError.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        looks = 0
        while True:
            lines = await self.status()
            hit = next(line for line in lines if line.id == process_id)
            looks = looks + 1 if hit.pid != instead_of_pid and all_serve(lines) else 0
            # A process that left while the scheduler was away is reported to it only now.
            if looks == _LOOKS_WHOLE:
                return
            if loop.time() > deadline_s:
                seen = ", ".join(f"{line.id} {line.state}" for line in lines)
                raise ChaosError(f"not within {timeout_s:g} s: {process_id} is whole again; {seen}")
            # Processes tell of themselves only when asked: that a scheduler knows a worker again is no event outside.
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def not_back(self) -> list[NotBack]:
        """The processes that do not serve now, with the last lines of their logs; empty if no cluster was started."""
        try:
            record = state_file.read(self.state_dir)
        except state_file.StateError:
            return []
        logs = {process.id: process.log for process in record.processes}
        return [
            NotBack(
                process_id=line.id,
                state=line.state,
                why=line.why,
                log=logs[line.id],
                log_tail=tail(Path(logs[line.id]), _LOG_TAIL_LINES),
            )
            for line in await self.status()
            if line.state not in _WELL
        ]

    async def _pass_on(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            self._tell(line.decode().rstrip())
