"""What runs the processes of a cluster: pools of replicas, and the interfaces to them. Knows no kind of machine.

A pool holds replicas of one role. A backend starts replicas, replaces those that end, and reports every change. A host
is narrower: it starts one process, and says when that process is ready and when it has ended. A backend over any host
is ``launcher.hosted.backend``; this machine's host is ``launcher.local.host``. Kubernetes has no single processes to
start: its backend is ``launcher.kubernetes.backend``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from runtime.roles import Role
from runtime.user_error import UserError

MemberState = Literal["pending", "starting", "ready", "draining", "ended"]


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """Replicas of one role with the same settings."""

    name: str
    role: Role
    replicas: int
    settings: tuple[str, ...] = ()
    """As `--set` takes them; they override the cluster's configuration file."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as the backend knows it."""

    id: str
    pool: str
    incarnation: str = ""
    """Names one life of the process and is never used twice. Empty: it does not run."""
    state: MemberState
    address: str = ""
    node: str = ""
    zone: str = ""
    why: str = ""
    """What a pending replica waits for, or how an ended one ended."""


class ProcessBackend(Protocol):
    """Runs pools of processes. Replicas that end unasked are started again, here or by what is behind it."""

    async def set_replicas(self, pool: str, replicas: int, *, go_first: Sequence[str] = ()) -> None:
        """Grow or shrink a pool; idempotent. A shrinking pool drains the replicas in ``go_first`` before others."""
        ...

    async def stop(self, id: str, *, drain_s: float, replace: bool) -> None:  # noqa: A002 - the interface's name
        """Ask one replica to finish what it runs within ``drain_s`` and to end; ``replace``: start it again.

        Returns at once; ``watch`` reports the rest. A replica that is down is started when ``replace`` is set.
        """
        ...

    async def list(self) -> Sequence[Member]:
        """Every replica."""
        ...

    def watch(self) -> AsyncGenerator[Member]:
        """Every change from now on, until the backend closes. It may begin with the replicas as they are."""
        ...

    async def logs(self, id: str, *, lines: int) -> Sequence[str]:  # noqa: A002 - the interface's name
        """The last lines that a replica wrote to its log."""
        ...

    async def close(self) -> None:
        """End every watch, and stop in order what this backend started."""
        ...


class StartError(UserError):
    """The cluster, or one process, cannot be started as asked; the message says why, in a sentence."""


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process to start. ``settings`` override the cluster's configuration file."""

    id: str
    role: Role
    pool: str = ""
    after: tuple[str, ...] = ()
    """Ids of the processes that must be ready before this one starts."""
    settings: tuple[str, ...] = ()
    environ: Mapping[str, str] = {}
    threads: int | None = None
    """Its share of the cores. None: the engine's own settings decide."""
    follows: bool = False
    """It is no worker of its own, but runs ranks of one whose leader is on another node."""

    @property
    def command(self) -> str:
        """The subcommand of `baton` that runs it."""
        return "engine-node" if self.follows else self.role.replace("_", "-")


class BecameReady(msgspec.Struct, frozen=True, tag=True):
    """The process said that it serves, and where."""

    id: str
    addresses: Mapping[str, str] = {}


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The process is gone. ``code`` is negative when a signal ended it."""

    id: str
    code: int
    why: str = ""
    """How it ended, where the code does not tell; continues a sentence that begins with its name."""


class Waiting(msgspec.Struct, frozen=True):
    """The process cannot be started yet. ``why`` continues a sentence that begins with its name."""

    id: str
    why: str


class Placed(msgspec.Struct, frozen=True):
    """The process is started now: it waits for room no more. ``taken_over``: it ran already."""

    id: str
    taken_over: bool = False


class HostLost(msgspec.Struct, frozen=True):
    """The host obeys another launcher from now on. Its processes run on."""

    why: str


HostEvent = BecameReady | Ended | Waiting | Placed | HostLost
Tell = Callable[[HostEvent], None]


class Process(Protocol):
    """One life of a process that a host has started."""

    @property
    def id(self) -> str:
        """As in its spec."""
        ...

    @property
    def pid(self) -> int:
        """As its machine counts."""
        ...

    @property
    def start_ticks(self) -> int:
        """When it was started, as its machine's kernel says: another process may get the same pid later."""
        ...

    @property
    def node(self) -> str:
        """The machine that it runs on. Empty: this one."""
        ...

    @property
    def running(self) -> bool:
        """Whether it has not ended, as far as its host knows."""
        ...

    async def stop(self, *, drain_s: float, timeout_s: float) -> bool:
        """Let it finish what it runs for ``drain_s``, then hurry it, and kill it when ``timeout_s`` have passed.

        Returns whether it ended by itself.
        """
        ...

    def kill(self) -> None:
        """End it and all that it started, now."""
        ...

    async def ended(self) -> None:
        """Wait until nothing of it is left."""
        ...


class ProcessHost(Protocol):
    """Where single processes are started. Restarts nothing by itself."""

    async def start(self, spec: ProcessSpec, tell: Tell) -> Process:
        """Start a process; its predecessor has ended. ``tell`` hears when it is ready, if it ever is, and its end.

        A process of the same cluster that runs already, and would be started just so, may be taken instead. A host on
        which a process may wait for room, or be taken over, tells when it is ``Placed``.

        Raises OSError or StartError.
        """
        ...

    def log(self, process_id: str) -> str:
        """Where people find the log of a process and its successors."""
        ...

    async def logs(self, process_id: str, lines: int) -> Sequence[str]:
        """The last lines of that log."""
        ...

    def stays_down(self, process_id: str) -> None:
        """This process is not started again unless an operator asks for it: its clients need not wait."""
        ...

    def close(self) -> None:
        """Nothing is started here any more: no client need wait."""
        ...
