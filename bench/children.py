"""Child processes of a measurement: their output, readiness and end. Knows nothing of what they serve."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.plain_server import READY_PREFIX, is_healthy

_POLL_INTERVAL_S = 0.25
_TAIL_LINES = 20


class ChildFailedError(RuntimeError):
    """A child process ended, or was not ready in time; says what its log says."""


class Child:
    """One child in a process group of its own, so that stopping it stops all that it started."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, log_path: Path, ready_prefix: str = READY_PREFIX
    ) -> None:
        self.name = name
        self._ready_prefix = ready_prefix.encode()
        self.log_path = log_path
        self._process = process
        self._ready: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._pump = asyncio.create_task(self._copy_output())

    @property
    def pid(self) -> int:
        """The child itself; its descendants are found from it."""
        return self._process.pid

    async def _copy_output(self) -> None:
        assert self._process.stdout is not None
        with self.log_path.open("wb", buffering=0) as log:
            async for line in self._process.stdout:
                log.write(line)
                if line.startswith(self._ready_prefix) and not self._ready.done():
                    self._ready.set_result(line.decode().split())

    def _failure(self, what: str) -> ChildFailedError:
        lines = self.log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if self.log_path.exists() else []
        return ChildFailedError("\n".join([f"{self.name} {what}; the end of {self.log_path}:", *lines]))

    async def wait_ready_line(self, timeout_s: float) -> str:
        """The address of its line `ready http://...`."""
        return (await self.wait_ready_words(timeout_s))[1]

    async def wait_ready_words(self, timeout_s: float) -> list[str]:
        """All words of that line."""
        waits: set[asyncio.Future[Any]] = {self._ready, self._pump}
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._ready in done:
            return self._ready.result()
        raise self._failure("ended before it was ready" if self._pump in done else f"was not ready in {timeout_s:g} s")

    async def wait_healthy(self, base_url: str, timeout_s: float) -> str:
        """Its address, once /health answers; for programs that print no line."""
        await self.wait_until(lambda: is_healthy(base_url), timeout_s)
        return base_url

    async def wait_until(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once ``is_ready``, which is asked in a thread, says so."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while loop.time() < deadline_s:
            if await asyncio.to_thread(is_ready):
                return
            done, _ = await asyncio.wait({self._pump}, timeout=_POLL_INTERVAL_S)
            if done:
                raise self._failure("ended before it was ready")
        raise self._failure(f"was not ready in {timeout_s:g} s")

    async def wait_end(self, timeout_s: float) -> tuple[int, str]:
        """Its exit code and its log, of a program that ends by itself."""
        async with asyncio.timeout(timeout_s):
            await self._pump
            code = await self._process.wait()
        return code, self.log_path.read_text(errors="replace")

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM to the child, then SIGKILL to its whole group."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):  # the kill below ends it
                await asyncio.wait_for(self._process.wait(), timeout_s)
        with contextlib.suppress(ProcessLookupError):  # nothing of the group is left, as it should be
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await self._pump
        if not self._ready.done():
            self._ready.cancel()


async def start_child(
    name: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
    log_path: Path,
    *,
    folder: Path | None = None,
    ready_prefix: str = READY_PREFIX,
) -> Child:
    """Start it in ``folder``, with these variables over our own."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        env={**os.environ, **environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        cwd=folder,
        limit=1 << 20,
    )
    return Child(name, process, log_path, ready_prefix)
