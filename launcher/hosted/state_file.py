"""The state file of a cluster: which processes `baton up` has started. Reads and writes one file; asks no process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from launcher.local.host import LOGS
from runtime.roles import Role
from runtime.rpc import trust
from runtime.text import is_text
from runtime.tls import TlsConfig
from runtime.user_error import UserError

STATE_FILE = "cluster.json"
LOCK_FILE = "lock"

RecordedState = Literal["waiting", "starting", "ready", "stopped", "dead", "restarting", "failed"]


class StateError(UserError):
    """The state folder cannot be used; the message says why, in a sentence."""


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher knows of one process. Empty text and 0 mean not known yet."""

    id: str
    role: Role
    pid: int = 0
    # Kernel's start time of the pid, so that another process that got the same number is not taken for ours.
    start_ticks: int = 0
    # The machine that it runs on. Empty: the launcher's.
    node: str = ""
    # host:port that users talk to. The second one answers StatusService too, unless the third one is set.
    address: str = ""
    grpc_address: str = ""
    status_address: str = ""
    metrics_address: str = ""
    epoch: int = 0
    state: RecordedState = "waiting"
    exit_code: int | None = None
    log: str = ""
    # Times it was restarted since the cluster was started, for any reason.
    restarts: int = 0
    # Why it is "restarting" or "failed".
    why: str = ""


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster on this machine."""

    launcher_pid: int
    launcher_start_ticks: int = 0
    # Where `baton up` serves LauncherService. Empty: not yet.
    control_address: str = ""
    model: str
    url: str = ""
    grpc_address: str = ""
    # With which certificates its processes are spoken to.
    tls: TlsConfig = TlsConfig()
    processes: tuple[ProcessRecord, ...] = ()


class ClusterState:
    """The state file while its cluster runs. Every change is written at once, whole, by rename.

    ``failed`` is called with the reason each time it cannot be written; the constructor raises StateError instead.
    ``on_change`` is called with each process that changed.
    """

    def __init__(self, state_dir: Path, record: ClusterRecord, failed: Callable[[str], None]) -> None:
        self._file = state_dir / STATE_FILE
        self._failed = failed
        self.on_change: Callable[[ProcessRecord], None] = lambda _: None
        self.record = record
        self._write()

    def process(self, process_id: str) -> ProcessRecord:
        """The record of one process."""
        return next(process for process in self.record.processes if process.id == process_id)

    def change(self, process_id: str, **changes: object) -> None:
        """Replace fields of one process's record."""
        processes = tuple(
            msgspec.structs.replace(process, **changes) if process.id == process_id else process
            for process in self.record.processes
        )
        self.note(processes=processes)
        self.on_change(self.process(process_id))

    def add(self, process: ProcessRecord) -> None:
        """Record one more process."""
        self.note(processes=(*self.record.processes, process))
        self.on_change(process)

    def note(self, **changes: object) -> None:
        """Replace fields of the cluster's record."""
        self.record = msgspec.structs.replace(self.record, **changes)
        try:
            self._write()
        except StateError as error:
            self._failed(str(error))

    def _write(self) -> None:
        try:
            write_atomically(self._file, msgspec.json.format(msgspec.json.encode(self.record), indent=2) + b"\n")
        except OSError as error:
            raise StateError(f"cannot write {self._file}: {error.strerror}") from error


def write_atomically(file: Path, content: bytes) -> None:
    """Readers see the old content or the new one, never a part."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def read(state_dir: Path) -> ClusterRecord:
    """The cluster last started with ``state_dir``; this process speaks to it as one of its own from now on.

    Raises StateError when there is none, and BadCertificate.
    """
    file = state_dir / STATE_FILE
    try:
        record = msgspec.json.decode(file.read_bytes(), type=ClusterRecord)
    except FileNotFoundError:
        raise StateError(f"no cluster was started with the state folder {state_dir}") from None
    except OSError as error:
        raise StateError(f"cannot read {file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"{file} is not a state file: {error}") from error
    if record.tls != trust.used():
        trust.use(record.tls)
    return record


@contextlib.contextmanager
def owned(state_dir: Path) -> Iterator[None]:
    """Hold ``state_dir`` for one launcher. Raises StateError when another one has it."""
    if not is_text(str(state_dir)):
        raise StateError(f"the name of the state folder {state_dir} is not UTF-8 text")
    try:
        (state_dir / LOGS).mkdir(parents=True, exist_ok=True)
        lock = (state_dir / LOCK_FILE).open("a+", errors="replace")
    except OSError as error:
        raise StateError(f"cannot use the state folder {state_dir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise StateError(
                f"another `baton up` (pid {owner}) runs with the state folder {state_dir}; stop it, or choose another "
                "folder with --state-dir"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
