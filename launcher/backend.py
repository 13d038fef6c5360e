"""What runs the processes of a cluster: pools of replicas, and the interface to them. Knows no kind of machine.

A pool holds replicas of one role. A backend starts replicas, replaces those that end, and reports every change. This
machine's backend is ``launcher.local.backend``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

import msgspec

from runtime.roles import Role

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
    """Runs pools of processes. Replicas that end unasked are started again."""

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
        """Every change from now on, until the backend closes."""
        ...

    async def logs(self, id: str, *, lines: int) -> Sequence[str]:  # noqa: A002 - the interface's name
        """The last lines that a replica wrote to its log."""
        ...

    async def close(self) -> None:
        """Stop every replica in order."""
        ...
