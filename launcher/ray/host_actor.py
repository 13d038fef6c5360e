"""The Ray actor that owns one process on its node. It takes and gives msgpack of structs, so nothing is pickled.

It lives for one life of the process. It obeys the launcher that has attached to it last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from launcher.backend import BecameReady, Ended, ProcessSpec
from launcher.local.child import Child, tail
from launcher.local.environment import CHILD_VARIABLE, child_environment
from launcher.local.host import CONFIG_FILE, command_of
from runtime.roles import Role

POLL_S = 2.5
"""Longest time for which a question for news is held."""
# What Ray sets for its workers, and a process of ours must not inherit: one OpenMP thread would slow an engine on CPU.
_RAYS_OWN = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT", "SPT_NOENV")


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A process to start. ``program``, where there is one, is started instead of `baton`."""

    spec: ProcessSpec
    folder: str
    config: str
    fingerprint: str
    environ: Mapping[str, str] = {}
    model_is_local: bool = False
    program: tuple[str, ...] = ()


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What an actor says of itself and of its process."""

    node: str
    """Address of the machine."""
    node_id: str = ""
    """Ray's name of it."""
    role: Role = "decode"
    """Of the process, if there is one."""
    pid: int = 0
    start_ticks: int = 0
    running: bool = False
    fingerprint: str = ""
    addresses: Mapping[str, str] = {}


class Taken(msgspec.Struct, frozen=True, tag=True):
    """Another launcher has attached."""


News = BecameReady | Ended | Taken


class HostActor:
    """Owns one process. All calls interleave."""

    def __init__(self, node: str, node_id: str) -> None:
        self._node, self._node_id = node, node_id
        self._launcher = ""
        self._launch: Launch | None = None
        self._child: Child | None = None
        # At most two: ready, ended.
        self._news: list[BecameReady | Ended] = []
        self._told = asyncio.Event()

    async def attach(self, launcher: str) -> bytes:
        """Obey this launcher from now on."""
        self._launcher = launcher
        self._wake()
        return self._facts()

    async def start(self, launch: bytes) -> bytes:
        """Start the process."""
        assert self._child is None, "an actor has one process"
        self._launch = what = msgspec.msgpack.decode(launch, type=Launch)
        folder = Path(what.folder) / what.spec.id
        # Its configuration may name secrets.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"the folder {folder} is another user's")
        config_file = folder / CONFIG_FILE
        config_file.write_text(what.config)
        self._child = await Child.start(
            what.spec.id,
            what.program or command_of(config_file, what.spec, what.spec.settings),
            environ=environment(os.environ, what),
            log=self._log(),
            tell=self._tell,
        )
        return self._facts()

    async def free_port(self) -> int:
        """A port of this node that is free now, for the processes of one worker on several nodes to meet at."""
        with socket.create_server((self._node, 0)) as free:
            return int(free.getsockname()[1])

    async def news(self, launcher: str, after: int) -> list[bytes]:
        """What has happened since the first ``after`` news; waits for some, ``POLL_S`` at most."""
        if launcher == self._launcher and len(self._news) <= after:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), POLL_S)
        if launcher != self._launcher:
            return [msgspec.msgpack.encode(Taken())]
        return [msgspec.msgpack.encode(one) for one in self._news[after:]]

    async def stop(self, launcher: str, drain_s: float, timeout_s: float) -> bool:
        """As ``Process.stop``. A launcher that is not obeyed any more changes nothing."""
        if launcher != self._launcher or self._child is None:
            return True
        return await self._child.stop(drain_s=drain_s, timeout_s=timeout_s)

    async def kill(self, launcher: str) -> None:
        """End the process now."""
        if launcher == self._launcher and self._child is not None:
            self._child.kill()

    async def ended(self) -> None:
        """Wait until nothing of the process is left."""
        if self._child is not None:
            await self._child.ended()

    async def logs(self, lines: int) -> list[str]:
        """The last lines of the log."""
        return tail(self._log(), lines)

    def _log(self) -> Path:
        assert self._launch is not None
        return log_file(Path(self._launch.folder), self._launch.spec.id)

    def _facts(self) -> bytes:
        child, ready = self._child, [one for one in self._news if isinstance(one, BecameReady)]
        facts = Facts(
            node=self._node,
            node_id=self._node_id,
            role=self._launch.spec.role if self._launch else "decode",
            pid=child.pid if child else 0,
            start_ticks=child.start_ticks if child else 0,
            running=child is not None and child.running,
            fingerprint=self._launch.fingerprint if self._launch else "",
            addresses=ready[0].addresses if ready else {},
        )
        return msgspec.msgpack.encode(facts)

    def _tell(self, event: BecameReady | Ended) -> None:
        self._news.append(event)
        self._wake()

    def _wake(self) -> None:
        self._told.set()
        self._told = asyncio.Event()


def environment(environ: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """The environment of a process: the node's without Ray's own, then what the cluster's operator wants."""
    nodes = {
        name: value
        for name, value in environ.items()
        if name not in _RAYS_OWN and not name.startswith(("RAY_", "BATON_"))
    }
    child = child_environment(
        nodes | dict(launch.environ), threads=launch.spec.threads, model_is_local=launch.model_is_local
    )
    return child | {CHILD_VARIABLE: "1", **launch.spec.environ}


def folder_of(cluster: str) -> Path:
    """Where every node keeps configuration and logs of a cluster: the same path on each, whatever its TMPDIR."""
    return Path("/tmp", f"baton-ray-{os.getuid()}", cluster)  # noqa: S108 - a folder of ours, which is checked


def log_file(folder: Path, process_id: str) -> Path:
    """The log of a process and of its successors on the same node."""
    return folder / process_id / "log"


def decoded(news: Sequence[bytes]) -> list[News]:
    """What ``HostActor.news`` said."""
    return [msgspec.msgpack.decode(one, type=News) for one in news]
