"""One child process: starting it in its own group, its ready line, its end, stopping it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from launcher.backend import BecameReady, Ended
from launcher.local import procfs, temp_dirs

Tell = Callable[[BecameReady | Ended], None]
READY_PREFIX = "BATON-READY "
_READ_BYTES = 65536
_TAIL_BYTES = 262_144
_LINE_BYTES_MAX = 65536
GROUP_EXIT_TIMEOUT_S = 3.0
"""Time that a dead process's children have to end, and again after they were killed."""
LAST_WORDS_TIMEOUT_S = 0.2
"""Time for which the stdout of a process that has ended is still read."""


class _Exit(asyncio.subprocess.SubprocessStreamProtocol):
    """Set when the process is reaped. ``Process.wait`` also waits for its pipe, which a child of it may keep open."""

    def __init__(self) -> None:
        super().__init__(limit=_READ_BYTES, loop=asyncio.get_running_loop())
        self.reaped = asyncio.Event()

    def process_exited(self) -> None:
        """As asyncio's, and say so."""
        super().process_exited()
        self.reaped.set()


class Child:
    """A child: a Process. Made by ``start``; ``tell`` is called at most twice: ready, then ended."""

    node = ""

    def __init__(
        self,
        process_id: str,
        process: asyncio.subprocess.Process,
        reaped: asyncio.Event,
        log: Path,
        tell: Tell,
        temp_dir: Path,
        last_words_timeout_s: float,
    ) -> None:
        self.id = process_id
        self.pid = process.pid
        self.log = log
        self._started_at_s = time.time()
        found = procfs.facts(process.pid)
        self.start_ticks = found.start_ticks if found else 0
        self._process = process
        self._reaped = reaped
        self._tell = tell
        self._temp_dir = temp_dir
        self._last_words_timeout_s = last_words_timeout_s
        self._shared_memory: set[Path] = set()
        self._ended = asyncio.create_task(self._follow(), name=f"follow {process_id}")

    @classmethod
    async def start(
        cls,
        process_id: str,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        log: Path,
        tell: Tell,
        pass_fds: Sequence[int] = (),
        last_words_timeout_s: float = LAST_WORDS_TIMEOUT_S,
    ) -> Child:
        """Start ``command`` in a session and with a temporary folder of its own, its stderr appended to ``log``.

        Raises OSError when the system refuses.
        """
        loop = asyncio.get_running_loop()
        temp_dir = temp_dirs.make()
        try:
            with log.open("ab") as stderr:
                transport, exit_ = await loop.subprocess_exec(
                    _Exit,
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=stderr,
                    env=temp_dirs.environment(temp_dir, environ),
                    start_new_session=True,
                    pass_fds=pass_fds,
                )
        except BaseException:
            temp_dirs.remove(temp_dir)
            raise
        process = asyncio.subprocess.Process(transport, exit_, loop)
        return cls(process_id, process, exit_.reaped, log, tell, temp_dir, last_words_timeout_s)

    @property
    def running(self) -> bool:
        """Whether it has not been reaped yet."""
        return self._process.returncode is None

    def note_shared_memory(self) -> None:
        """Note the shared memory that its group uses now: after a kill this cannot be found out."""
        self._shared_memory |= procfs.shared_memory_of(procfs.group_members(self.pid))

    def send(self, number: signal.Signals) -> None:
        """Signal the process itself, if it still runs."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """End the process and everything it started, now; only the helper that cleans up behind them lives on."""
        # After the kill this cannot be found out.
        self.note_shared_memory()
        members = [self.pid] if self.running else []
        members += procfs.group_members(self.pid)
        _kill(pid for pid in members if not procfs.is_resource_tracker(pid))

    async def stop(self, *, drain_s: float, timeout_s: float) -> bool:
        """Let it finish what it runs for ``drain_s``, then hurry it, and kill its group when ``timeout_s`` have passed.

        Returns whether it ended by itself.
        """
        self.send(signal.SIGTERM)
        done, _ = await asyncio.wait({self._ended}, timeout=min(drain_s, timeout_s))
        if not done:
            self.send(signal.SIGTERM)
            done, _ = await asyncio.wait({self._ended}, timeout=max(0.0, timeout_s - drain_s))
        if not done:
            self.kill()
        await self.ended()
        return bool(done)

    async def ended(self) -> None:
        """Wait until it was reaped and nothing of it is left."""
        await asyncio.shield(self._ended)

    async def _follow(self) -> None:
        await self._read_stdout()
        await self._reaped.wait()
        assert self._process.returncode is not None, self.id
        self._tell(Ended(self.id, self._process.returncode))
        await self._clean_up()

    async def _clean_up(self) -> None:
        members = procfs.group_members(self.pid)
        if members:
            self._shared_memory |= procfs.shared_memory_of(members)
            await asyncio.to_thread(procfs.wait_until_gone, members, GROUP_EXIT_TIMEOUT_S)
            self.kill()
            await asyncio.to_thread(procfs.wait_until_gone, members, GROUP_EXIT_TIMEOUT_S)
            _kill(procfs.group_members(self.pid))
        procfs.remove_unused(self._shared_memory, made_since_s=self._started_at_s)
        await asyncio.to_thread(temp_dirs.remove, self._temp_dir)

    async def _read_stdout(self) -> None:
        """Read until the ready line; all other lines go to the log. Ends with the process, not with its children."""
        assert self._process.stdout is not None
        reading = asyncio.create_task(self._read_lines(self._process.stdout), name=f"read {self.id}")
        waiting = asyncio.create_task(self._reaped.wait(), name=f"wait {self.id}")
        await asyncio.wait({reading, waiting}, return_when=asyncio.FIRST_COMPLETED)
        # Its last lines may still be in the pipe. A child of it that keeps the pipe open must not delay this.
        await asyncio.wait({reading}, timeout=self._last_words_timeout_s if waiting.done() else None)
        for task in (reading, waiting):
            task.cancel()

    async def _read_lines(self, stdout: asyncio.StreamReader) -> None:
        rest = b""
        with self.log.open("ab", buffering=0) as log:

            def write(line: str) -> None:
                # A full disk loses the line. The ready line behind it must be heard all the same.
                with contextlib.suppress(OSError):
                    log.write(f"{line}\n".encode())

            while chunk := await stdout.read(_READ_BYTES):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    self._take_line(line.decode(errors="replace"), write)
                rest = rest[-_LINE_BYTES_MAX:]

    def _take_line(self, line: str, write: Callable[[str], None]) -> None:
        if not line.startswith(READY_PREFIX):
            write(line)
            return
        try:
            addresses = msgspec.json.decode(line.removeprefix(READY_PREFIX), type=dict[str, str])
        except msgspec.MsgspecError:
            write(f"not a ready line: {line}")
            return
        self.note_shared_memory()
        self._tell(BecameReady(self.id, addresses))


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def tail(log: Path, lines: int) -> list[str]:
    """The last ``lines`` lines of ``log``, which may be missing."""
    if lines <= 0:
        return []
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-lines:]
