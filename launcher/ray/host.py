"""A Ray cluster as a host: one detached actor for each life of a process. Neither is on the path of a request.

Actors outlive the launcher, so that the next one finds and takes what runs (``_Found``). An actor is never restarted by
Ray: Ray would start another process while the former one still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import ActorDiedError, RayError

from launcher import model_choice
from launcher.backend import BecameReady, Ended, HostLost, ProcessSpec, StartError, Tell, Waiting
from launcher.config import BatonConfig, LauncherConfig, drain_s
from launcher.ray import cluster
from launcher.ray.host_actor import POLL_S, Facts, HostActor, Launch, Taken, decoded, folder_of, log_file
from launcher.ray.placement import NODE_LABEL, Ask, asks
from runtime.configuration import dump
from runtime.roles import Role

LOST_AFTER_S = 10.0
"""An actor that has not answered for so long is taken for lost with its node, and its process is started elsewhere."""
_RETRY_S = 0.5
_BACK_INTERVAL_S = 2.0
_BACK_MAX_S = 3600.0
"""A lost node that comes back later is not looked at any more; its processes are ended by the next `baton up`."""
_CALL_TIMEOUT_S = 10.0
_WAITING_SAID_AFTER_S = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

CommandOf = Callable[[ProcessSpec, Sequence[str]], Sequence[str]]


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
            by_itself: bool = await asyncio.wait_for(call, timeout_s + _CALL_TIMEOUT_S)
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
            return list(await asyncio.wait_for(self._actor.logs.remote(lines), _CALL_TIMEOUT_S))
        except (RayError, TimeoutError):
            return []

    def leave(self) -> None:
        """It is another launcher's from now on."""
        self._over.set()

    async def _follow(self) -> None:
        """Pass on what the actor says, until the end of the process or of the actor."""
        heard, heard_s = 0, asyncio.get_running_loop().time()
        while not self._over.is_set():
            try:
                call = self._actor.news.remote(self._host.launcher, heard)
                news = decoded(await asyncio.wait_for(call, POLL_S + LOST_AFTER_S / 2))
            except ActorDiedError:
                self._is_lost(gone=True)
                return
            except (RayError, TimeoutError):
                if asyncio.get_running_loop().time() - heard_s > LOST_AFTER_S:
                    self._is_lost(gone=False)
                    return
                await asyncio.sleep(_RETRY_S)
                continue
            heard, heard_s = heard + len(news), asyncio.get_running_loop().time()
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
        """End a process that was taken for lost, and has a successor, as soon as its actor answers again."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + _BACK_MAX_S
        while loop.time() < until_s:
            try:
                await self._host.end(self._spec.role, self._actor)
            except ActorDiedError:
                return None
            except (RayError, TimeoutError):
                await asyncio.sleep(_BACK_INTERVAL_S)  # the node may come back at any time, and nothing says so
            else:
                return self._host.avoided.discard(self._node_id)
        return None


class RayHost:
    """Starts processes on the nodes of the Ray cluster that this program is connected to. A ProcessHost.

    ``ids`` are those that the cluster has; others that are found running under its name are ended.
    """

    def __init__(self, config: BatonConfig, ids: Sequence[str], *, command: CommandOf | None = None) -> None:
        self._config = config
        self._ids = frozenset(ids)
        self._command = command
        self._folder = folder_of(config.launcher.ray.cluster)
        self._config_text = dump(config).decode()
        # What the launcher does with processes is not what they are started with.
        of_processes = msgspec.structs.replace(config, launcher=LauncherConfig())
        self._seed = hashlib.sha256(dump(of_processes))
        self.launcher = uuid.uuid4().hex
        self.taken = False
        # Nodes that do not answer, by Ray's names.
        self.avoided: set[str] = set()
        self._lives: dict[str, RayProcess] = {}
        # A scheduler that is started again is where it was: everything else has its address.
        self._ports: dict[str, str] = {}
        # The zone or node of those that want the same one.
        self._near = ""
        self._jobs: set[asyncio.Task[None]] = set()
        self._finding: asyncio.Task[dict[str, list[tuple[Any, Facts]]]] | None = None
        self._closing = asyncio.Event()

    # ProcessHost

    async def start(self, spec: ProcessSpec, tell: Tell) -> RayProcess:
        """Take the process that runs already, or start one where Ray finds room. Raises StartError."""
        try:
            life = await self._taken_over(spec, tell) or await self._started(spec, tell)
        except (RayError, TimeoutError) as error:
            raise StartError(f"Ray did not start {spec.id}: {_first_line(error)}") from error
        self._lives[spec.id] = life
        return life

    def log(self, process_id: str) -> str:
        """The log file on the process's node."""
        return str(log_file(self._folder, process_id))

    async def logs(self, process_id: str, lines: int) -> Sequence[str]:
        """What the actor of the last life reads, if it still lives."""
        life = self._lives.get(process_id)
        return [] if life is None else await life.logs(lines)

    def stays_down(self, process_id: str) -> None:
        """Nothing is kept for it."""

    def close(self) -> None:
        """End the wait for room."""
        self._closing.set()

    # For its processes

    def run(self, job: Coroutine[Any, Any, None]) -> None:
        """Do something beside."""
        task = asyncio.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    def leave(self, tell: Tell) -> None:
        """Another launcher has taken the cluster over: do nothing to it any more."""
        if not self.taken:
            self.taken = True
            name = self._config.launcher.ray.cluster
            tell(HostLost(f"another `baton up` has taken over the cluster {name} (launcher.ray.cluster); leaving it"))
        for life in self._lives.values():
            life.leave()

    async def end(self, role: Role, actor: Any) -> None:
        """Let what an actor runs finish its requests, end it and the actor. Raises RayError or TimeoutError."""
        drain = drain_s(role, self._config)
        timeout_s = drain + self._config.launcher.stop_timeout_s
        await asyncio.wait_for(actor.attach.remote(self.launcher), _CALL_TIMEOUT_S)
        await asyncio.wait_for(actor.stop.remote(self.launcher, drain, timeout_s), timeout_s + _CALL_TIMEOUT_S)
        await self.remove(actor)

    async def remove(self, actor: Any) -> None:
        """End an actor whose process has ended."""
        with contextlib.suppress(RayError, TimeoutError):  # it is gone, or goes now
            await asyncio.wait_for(actor.ended.remote(), _CALL_TIMEOUT_S)
        await asyncio.to_thread(ray.kill, actor)

    def reachable(self, spec: ProcessSpec, addresses: Mapping[str, str], node: str) -> Mapping[str, str]:
        """The addresses of a process as other machines reach them."""
        if spec.role == "scheduler":
            listens = addresses.get("local_address") or addresses.get("grpc_address", "")
            self._ports[spec.id] = listens.rpartition(":")[2]
        wildcards = ("0.0.0.0:", "[::]:", ":::")
        return {
            name: f"{node}:{address.rpartition(':')[2]}" if address.startswith(wildcards) else address
            for name, address in addresses.items()
        }

    # Starting

    async def _taken_over(self, spec: ProcessSpec, tell: Tell) -> RayProcess | None:
        """What an earlier launcher has left of this process, if it was started with the same configuration."""
        if self._finding is None:
            self._finding = asyncio.create_task(self._find())
        chosen: RayProcess | None = None
        for actor, facts in (await self._finding).pop(spec.id, []):
            same = facts.fingerprint == self._fingerprint(spec)
            if same and facts.addresses:
                self.reachable(spec, facts.addresses, facts.node)  # for the scheduler's port
            if same and facts.running and chosen is None:
                chosen = RayProcess(self, spec, actor, facts, tell)
            else:
                await self.end(spec.role, actor)
        return chosen

    async def _find(self) -> dict[str, list[tuple[Any, Facts]]]:
        """Attach to all that runs under this cluster's name, and end what the cluster does not have any more."""
        found: dict[str, list[tuple[Any, Facts]]] = {}
        for name in await asyncio.to_thread(cluster.named, self._config.launcher.ray.cluster):
            try:
                actor = await asyncio.to_thread(ray.get_actor, name)
                said = await asyncio.wait_for(actor.attach.remote(self.launcher), _CALL_TIMEOUT_S)
            except (ValueError, RayError, TimeoutError):
                continue  # it ends, or its node is lost
            process_id = name.split("/")[1]
            facts = msgspec.msgpack.decode(said, type=Facts)
            found.setdefault(process_id, []).append((actor, facts))
        for process_id in found.keys() - self._ids:
            for actor, _ in found.pop(process_id):
                self.run(self._end_surplus(actor))
        return found

    async def _end_surplus(self, actor: Any) -> None:
        with contextlib.suppress(RayError, TimeoutError):  # then it is lost anyway
            await self.end("decode", actor)

    async def _started(self, spec: ProcessSpec, tell: Tell) -> RayProcess:
        nodes = await asyncio.to_thread(cluster.nodes)
        self.avoided &= {node.labels[NODE_LABEL] for node in nodes}
        usable = [node for node in nodes if node.labels[NODE_LABEL] not in self.avoided]
        wanted, self._near = asks(self._config, usable, self._near)
        ask = wanted[spec.role].avoiding(self.avoided)
        name = f"{self._config.launcher.ray.cluster}/{spec.id}/{uuid.uuid4().hex[:8]}"
        actor = await asyncio.to_thread(_made, name, ask)
        try:
            facts = await self._placed(actor, spec, ask, tell)
            launch = msgspec.msgpack.encode(self._launch(spec, facts.node))
            said = await asyncio.wait_for(actor.start.remote(launch), _CALL_TIMEOUT_S)
        except (RayError, TimeoutError, StartError, asyncio.CancelledError):
            await asyncio.to_thread(ray.kill, actor)
            raise
        return RayProcess(self, spec, actor, msgspec.msgpack.decode(said, type=Facts), tell)

    async def _placed(self, actor: Any, spec: ProcessSpec, ask: Ask, tell: Tell) -> Facts:
        """Wait until Ray has found room for the actor, and say once what for if that takes long."""
        attached = asyncio.ensure_future(actor.attach.remote(self.launcher))
        closing = asyncio.create_task(self._closing.wait())
        done, _ = await asyncio.wait({attached, closing}, timeout=_WAITING_SAID_AFTER_S, return_when="FIRST_COMPLETED")
        if not done:
            tell(Waiting(spec.id, f"waits for room in the Ray cluster: it asks for {ask}"))
            await asyncio.wait({attached, closing}, return_when="FIRST_COMPLETED")
        closing.cancel()
        if not attached.done():
            attached.cancel()
            raise StartError("the cluster stops")
        return msgspec.msgpack.decode(attached.result(), type=Facts)

    def _launch(self, spec: ProcessSpec, node: str) -> Launch:
        settings = (*spec.settings, *_address_settings(spec.role, self._config, node))
        if (port := self._ports.get(spec.id)) is not None:
            settings = (*settings, f"scheduler.port={port}")
        return Launch(
            spec=msgspec.structs.replace(spec, settings=settings),
            folder=os.fspath(self._folder),
            config=self._config_text,
            fingerprint=self._fingerprint(spec),
            environ=self._config.launcher.ray.environ,
            model_is_local=model_choice.is_local(self._config.engine.model),
            program=tuple(self._command(spec, settings)) if self._command else (),
        )

    def _fingerprint(self, spec: ProcessSpec) -> str:
        """Tells whether a process that runs is one that would be started now."""
        whole = self._seed.copy()
        whole.update(msgspec.json.encode([spec.settings, self._config.launcher.ray.environ]))
        return whole.hexdigest()


class _OnNode(HostActor):
    """With what Ray says of its node."""

    def __init__(self) -> None:
        super().__init__(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id())


def _made(name: str, ask: Ask) -> Any:
    """A new actor, which Ray has yet to place. Waits for Ray's head."""
    made = ray.remote(_OnNode).options(
        name=name, lifetime="detached", max_restarts=0, max_task_retries=0, **ask.options()
    )
    return made.remote()


def _address_settings(role: Role, config: BatonConfig, node: str) -> tuple[str, ...]:
    """Where a process listens so that other machines reach it, unless the operator has said so."""
    section, name = config.of_role(role), "worker" if role in ("prefill", "decode") else role
    if section.host in _LOOPBACK:
        return (f"{name}.host={node}",)
    if getattr(section, "advertise_host", section.host):
        return ()
    return (f"{name}.advertise_host={node}",)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
