"""One life of a process on a Ray cluster, as the launcher follows it: on one node, or a worker's on several."""

from __future__ import annotations

import asyncio
import functools
import signal
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from ray.exceptions import ActorDiedError, RayError

from engine.epoch import EPOCH_VARIABLE
from launcher.backend import BecameReady, Ended, HostEvent, ProcessSpec, Tell
from launcher.ray.host_actor import Facts, Taken, decoded

if TYPE_CHECKING:
    from launcher.ray.host import RayHost

CALL_TIMEOUT_S = 60.0
"""Of a call for which Ray says nothing: a busy machine is silent, too. Where it cannot reach an actor, it says so."""
_LOGS_TIMEOUT_S = 10.0
_LOOK_S = 5.0
AWAY_LOOKS = 2
"""An actor that Ray cannot reach, and that has not answered after so many waits of ``_LOOK_S``, is lost with its node.

Waits are counted instead of seconds: if the launcher itself stood still, that is one of them.
"""
_SILENT_LOOKS = 12
"""The same where Ray says nothing. A busy machine is silent, too, and of a dead one Ray tells sooner than that."""
_RETRY_S = 0.5


async def answered(ask: Callable[[], Awaitable[Any]], silent_looks: int = _SILENT_LOOKS) -> Any:
    """What an actor answers. Raises ActorDiedError, or TimeoutError when it is to be taken for lost."""
    # One question for all waits: on a busy machine a second one would be behind the first.
    away = asyncio.Event()
    asked = asyncio.create_task(_asked(ask, away))
    try:
        for looks in range(1, silent_looks + 1):
            await asyncio.wait({asked}, timeout=_LOOK_S)
            if asked.done():
                return asked.result()
            if away.is_set() and looks >= AWAY_LOOKS:
                break
        raise TimeoutError
    finally:
        asked.cancel()


async def _asked(ask: Callable[[], Awaitable[Any]], away: asyncio.Event) -> Any:
    while True:
        try:
            return await ask()
        except ActorDiedError:
            raise
        except RayError:
            away.set()
            await asyncio.sleep(_RETRY_S)


class RayProcess:
    """One life of a process on some node. A Process."""

    def __init__(self, host: RayHost, spec: ProcessSpec, actor: Any, facts: Facts, tell: Tell) -> None:
        self.id, self.pid, self.start_ticks, self.node = spec.id, facts.pid, facts.start_ticks, facts.node
        self._node_id = facts.node_id
        self._host = host
        self._spec = spec
        self._actor = actor
        self._tell = tell
        self._over = asyncio.Event()
        self._lost = False
        host.run(self._follow())

    @property
    def running(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return not self._over.is_set()

    async def stop(self, *, drain_s: float, timeout_s: float) -> bool:
        """Have its actor stop it."""
        call = self._actor.stop.remote(self._host.launcher, drain_s, timeout_s)
        try:
            by_itself: bool = await asyncio.wait_for(call, timeout_s + CALL_TIMEOUT_S)
        except (RayError, TimeoutError):
            by_itself = False
        await self.ended()
        return by_itself

    def kill(self) -> None:
        """Have its actor kill it."""
        self._actor.kill.remote(self._host.launcher)

    async def ended(self) -> None:
        """Wait until it has ended and its actor has nothing left to clean up; then the actor goes, too."""
        await self._over.wait()
        if not self._lost and not self._host.taken:
            await self._host.remove(self._actor)

    async def logs(self, lines: int) -> Sequence[str]:
        """What its actor reads."""
        try:
            return list(await asyncio.wait_for(self._actor.logs.remote(lines), _LOGS_TIMEOUT_S))
        except (RayError, TimeoutError):
            return []

    def leave(self) -> None:
        """It is another launcher's from now on."""
        self._over.set()

    async def _follow(self) -> None:
        """Pass on what the actor says, until the end of the process or of the actor."""
        heard = 0
        while not self._over.is_set():
            try:
                news = decoded(await answered(functools.partial(self._actor.news.remote, self._host.launcher, heard)))
            except (ActorDiedError, TimeoutError) as error:
                if not self._over.is_set():
                    self._is_lost(gone=isinstance(error, ActorDiedError))
                return
            heard += len(news)
            for one in news:
                match one:
                    case Taken():
                        self._host.leave(self._tell)
                    case BecameReady(process_id, addresses):
                        self._tell(BecameReady(process_id, self._host.reachable(self._spec, addresses, self.node)))
                    case Ended():
                        self._over.set()
                        self._tell(one)

    def _is_lost(self, *, gone: bool) -> None:
        self._lost = True
        self._over.set()
        self._tell(Ended(self.id, -signal.SIGKILL, f"was lost with its actor on {self.node}"))
        if not gone:
            # Ray itself needs longer to notice, and would start it there again.
            self._host.avoided.add(self._node_id)
            self._host.run(self._end_when_back())

    async def _end_when_back(self) -> None:
        await self._host.end_when_it_answers(self._actor)
        self._host.avoided.discard(self._node_id)


def part_of(spec: ProcessSpec, rank: int, *, hosts: Sequence[str], port: int, epoch: int) -> ProcessSpec:
    """The process of a worker on the node ``rank`` of several, whose addresses are ``hosts``; the first leads."""
    settings = {
        "nnodes": len(hosts),
        "node_rank": rank,
        "master_addr": hosts[0],
        "master_port": port,
        "distributed_executor_backend": "mp",
    }
    return msgspec.structs.replace(
        spec,
        id=_part_id(spec, rank),
        follows=rank > 0,
        settings=(*spec.settings, *(f"engine.args.{name}={value}" for name, value in settings.items())),
        # The address that vLLM tells its other nodes.
        environ={**spec.environ, EPOCH_VARIABLE: str(epoch), "VLLM_HOST_IP": hosts[rank]},
    )


def _part_id(spec: ProcessSpec, rank: int) -> str:
    return f"{spec.id}.{rank}" if rank else spec.id


class RayGroup:
    """One life of a worker on several nodes: the process of its leader, then those of its followers. A Process.

    They are one engine: when one ends, so do the others. ``remove`` frees what Ray holds for them.
    """

    def __init__(self, host: RayHost, spec: ProcessSpec, tell: Tell, remove: Callable[[], Awaitable[None]]) -> None:
        self.id = spec.id
        self._host = host
        self._spec = spec
        self._tell = tell
        self._remove = remove
        self._parts: list[RayProcess] = []
        self._over = False

    def add(self, actor: Any, facts: Facts) -> None:
        """The next process; the leader is the first."""
        rank = len(self._parts)
        spec = msgspec.structs.replace(self._spec, id=_part_id(self._spec, rank))
        self._parts.append(RayProcess(self._host, spec, actor, facts, lambda event: self._hear(rank, event)))

    @property
    def pid(self) -> int:
        """The leader's."""
        return self._parts[0].pid

    @property
    def start_ticks(self) -> int:
        """The leader's."""
        return self._parts[0].start_ticks

    @property
    def node(self) -> str:
        """The leader's."""
        return self._parts[0].node

    @property
    def running(self) -> bool:
        """Whether all run, as far as is known."""
        return not self._over and all(part.running for part in self._parts)

    async def stop(self, *, drain_s: float, timeout_s: float) -> bool:
        """Have the leader finish what it runs. The followers end with it."""
        by_itself = await self._parts[0].stop(drain_s=drain_s, timeout_s=timeout_s)
        await self.ended()
        return by_itself

    def kill(self) -> None:
        """Have them all killed."""
        for part in self._parts:
            if part.running:
                part.kill()

    async def ended(self) -> None:
        """Wait until nothing of them is left."""
        await asyncio.gather(*(part.ended() for part in self._parts))
        await self._remove()

    async def logs(self, lines: int) -> Sequence[str]:
        """The leader's."""
        return await self._parts[0].logs(lines)

    def leave(self) -> None:
        """They are another launcher's from now on."""
        for part in self._parts:
            part.leave()

    def _hear(self, rank: int, event: HostEvent) -> None:
        match event:
            case Ended(_, code, why) if not self._over:
                self._over = True
                self.kill()
                part = self._parts[rank]
                lost = f"lost {part.id} on {part.node}: {why or f'it ended with code {code}'}"
                self._tell(Ended(self.id, code, lost if rank else why))
            case Ended():
                pass
            case BecameReady() if rank:
                pass  # the leader is ready when they all are
            case _:
                self._tell(event)
