"""`baton record`: writes what a running cluster is asked into trace files, without texts, tokens or names."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cli.settings import NO_SOURCES, Sources, StateDir, load, state_folder
from runtime.process.exit_codes import ExitCode
from runtime.user_error import UserError

if TYPE_CHECKING:
    from protos.scheduler.v1 import scheduler_pb2 as pb
    from simulation.replay.recording import RecordingFiles
    from simulation.replay.traces import Tally

MEBIBYTE = 1024 * 1024
PROGRESS_INTERVAL_S = 10.0


class CannotRecord(UserError):
    """An option has a value that it cannot have, or a file cannot be written."""

    exit_code = ExitCode.BAD_OPTION


def record(
    *,
    output: Path,
    file_mb: int = 64,
    files: int = 16,
    state_dir: StateDir = None,
    sources: Sources = NO_SOURCES,
) -> None:
    """Record the traffic of a cluster until Ctrl-C, for `baton simulate`.

    A record says when a request came, how long its prompt and its output were, its class, and which others began with
    the same blocks or had the same tenant. Block keys and tenants are digests under a salt that is not kept. The last
    line of each file says how many requests are left out.

    Parameters
    ----------
    output
        folder for the files; it is made if there is none
    file_mb
        a file ends when it has so many MiB, compressed
    files
        number of files to keep; when there is one more, the oldest is deleted
    """
    for name, value in (("--file-mb", file_mb), ("--files", files)):
        if value < 1:
            raise CannotRecord(f"{name}: {value} is less than 1")
    try:
        from simulation.replay.recording import RecordingFiles
    except ImportError:
        raise CannotRecord("install the package zstandard") from None

    name = f"trace-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = state_folder(load(sources, state_dir).value)
    try:
        output.mkdir(parents=True, exist_ok=True)
        written = RecordingFiles(output, name, file_bytes_max=file_mb * MEBIBYTE, files_max=files)
        try:
            asyncio.run(_Recording(written).run(folder))
        finally:
            for path in written.whole:
                print(path)
    except OSError as error:
        raise CannotRecord(f"{output}: {error.strerror or error}") from error


class _Recording:
    """Follows a cluster until it is told to stop."""

    def __init__(self, files: RecordingFiles) -> None:
        from simulation.replay.recording import Salted

        self._files = files
        self._salted = Salted(secrets.token_bytes(32))
        self._recorded = self._asked = self._dropped = 0
        self._progress: asyncio.TimerHandle | None = None

    async def run(self, state_dir: Path) -> None:
        from launcher.hosted import operator_commands

        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            async with aclosing(operator_commands.record(state_dir)) as batches:
                # The first one comes at once, and is empty.
                self._take(await anext(batches))
                self._tell()
                async for batch in batches:
                    self._take(batch)
        except asyncio.CancelledError:
            task.uncancel()  # a signal is how a recording ends
        finally:
            self._files.close(self._tally())
            self._tell()

    def _take(self, batch: pb.TraceRecords) -> None:
        from simulation.replay.traces import Arrival

        self._asked, self._dropped = batch.asked, batch.dropped
        for told in batch.records:
            arrival = Arrival(
                arrived_s=told.arrived_s,
                prompt_tokens=told.prompt_tokens,
                output_tokens=told.output_tokens,
                block_keys=self._salted.keys(told.block_keys),
                priority_class=told.priority_class,
                tenant=self._salted.tenant(told.tenant),
            )
            self._files.write(arrival, batch.key_tokens, self._tally())
            self._recorded += 1
        self._files.flush(self._tally())
        if batch.records and self._progress is None:
            self._progress = asyncio.get_running_loop().call_later(PROGRESS_INTERVAL_S, self._tell)

    def _tally(self) -> Tally:
        from simulation.replay.traces import Tally

        unfinished = max(0, self._asked - self._dropped - self._recorded)
        return Tally(recorded=self._recorded, dropped=self._dropped, unfinished=unfinished)

    def _tell(self) -> None:
        self._progress = None
        tally = self._tally()
        text = f"{tally.recorded} requests recorded, {tally.dropped} dropped, {tally.unfinished} unfinished"
        print(text, file=sys.stderr, flush=True)
