"""A Ray cluster as a host: one detached actor for each life of a process. Neither is on the path of a request.

Actors outlive the launcher, so that the next one finds and takes what runs (``_find``). An actor is never restarted by
Ray: Ray would start another process while the former one still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.epoch import EPOCH_MIN_VARIABLE
from launcher import model_choice
from launcher.backend import HostLost, Placed, ProcessSpec, StartError, Tell, Waiting
from launcher.config import BatonConfig, LauncherConfig, drain_s
from launcher.ray import cluster
from launcher.ray.host_actor import Facts, HostActor, Launch, folder_of, log_file
from launcher.ray.lives import AWAY_LOOKS, CALL_TIMEOUT_S, RayGroup, RayProcess, answered, part_of
from launcher.ray.placement import NODE_LABEL, Ask, asks
from runtime.configuration import dump
from runtime.roles import Role
from runtime.timing.backoff import backoff_s

_WAITING_SAID_AFTER_S = 5.0
# How often an actor that does not answer is asked again.
_RETRY_MIN_S, _RETRY_MAX_S = 2.0, 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

CommandOf = Callable[[ProcessSpec, Sequence[str]], Sequence[str]]
# The actors of one life, the leader's first, and what each says; by the name of the life; by process.
_Parts = list[tuple[Any, Facts]]
_Found = dict[str, dict[str, _Parts]]


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
        self._lives: dict[str, RayProcess | RayGroup] = {}
        # A scheduler that is started again is where it was: everything else has its address.
        self._ports: dict[str, str] = {}
        # The zone or node of those that want the same one.
        self._near = ""
        self._jobs: set[asyncio.Task[None]] = set()
        self._finding: asyncio.Task[_Found] | None = None
        self._closing = asyncio.Event()

    # ProcessHost

    async def start(self, spec: ProcessSpec, tell: Tell) -> RayProcess | RayGroup:
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

    async def end_when_it_answers(self, actor: Any, life: str = "") -> None:
        """End an actor that has no place here any more, and free what Ray holds for its life.

        It may answer late, or never: Ray has no room for it yet, or its node is away.
        """
        asked, over = 0, False
        try:
            while not over and not self.taken:
                asked += 1
                try:
                    await self._end(actor)
                    over = True
                except ActorDiedError:
                    over = True
                except (RayError, TimeoutError):
                    # Nothing says when it is there.
                    await asyncio.sleep(backoff_s(asked, min_s=_RETRY_MIN_S, max_s=_RETRY_MAX_S))
        finally:
            # Also when this launcher ends before it answers.
            if not self.taken:
                with contextlib.suppress(RayError):
                    await asyncio.to_thread(ray.kill, actor)
                await asyncio.to_thread(_remove_group, life)

    async def _end(self, actor: Any) -> None:
        """Let what an actor runs finish its requests, end it and the actor. Raises RayError or TimeoutError."""
        said = await asyncio.wait_for(actor.attach.remote(self.launcher), CALL_TIMEOUT_S)
        drain = drain_s(msgspec.msgpack.decode(said, type=Facts).role, self._config)
        timeout_s = drain + self._config.launcher.stop_timeout_s
        await asyncio.wait_for(actor.stop.remote(self.launcher, drain, timeout_s), timeout_s + CALL_TIMEOUT_S)
        await self.remove(actor)

    async def remove(self, actor: Any) -> None:
        """End an actor whose process has ended."""
        with contextlib.suppress(RayError, TimeoutError):  # it is gone, or goes now
            await asyncio.wait_for(actor.ended.remote(), CALL_TIMEOUT_S)
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

    async def _taken_over(self, spec: ProcessSpec, tell: Tell) -> RayProcess | RayGroup | None:
        """What an earlier launcher has left of this process, if it was started with the same configuration."""
        # Those that start at once share one look. One that failed is taken again.
        if self._finding is None or (self._finding.done() and self._finding.exception() is not None):
            self._finding = asyncio.create_task(self._find())
        chosen: RayProcess | RayGroup | None = None
        placement = None if spec.role == "scheduler" else self._config.launcher.ray.placement.get(spec.role)
        nodes = 1 if placement is None else placement.nodes
        for life, parts in (await asyncio.shield(self._finding)).pop(spec.id, {}).items():
            facts = [part for _, part in parts]
            same = len(parts) == nodes and all(one.fingerprint == self._fingerprint(spec) for one in facts)
            if same and facts[0].addresses:
                self.reachable(spec, facts[0].addresses, facts[0].node)  # for the scheduler's port
            if same and all(one.running for one in facts) and chosen is None:
                tell(Placed(spec.id, taken_over=True))
                chosen = self._life(spec, life, parts, tell)
            else:
                await self._end_life(life, parts)
        return chosen

    def _life(self, spec: ProcessSpec, life: str, parts: _Parts, tell: Tell) -> RayProcess | RayGroup:
        """What runs in these actors, the leader's first."""
        if len(parts) == 1:
            return RayProcess(self, spec, *parts[0], tell)
        group = RayGroup(self, spec, tell, functools.partial(self._free, life))
        for actor, facts in parts:
            group.add(actor, facts)
        return group

    async def _free(self, life: str) -> None:
        if not self.taken:
            await asyncio.to_thread(_remove_group, life)

    async def _find(self) -> _Found:
        """Attach to all that runs under this cluster's name, and end what the cluster does not have any more."""
        found: _Found = {}
        names = sorted(await asyncio.to_thread(cluster.named, self._config.launcher.ray.cluster))
        for name, part in zip(names, await asyncio.gather(*map(self._attached, names)), strict=True):
            match part:
                case None:
                    pass  # it has ended
                case actor, None:
                    # Its process has a successor by then. Not before this look is sure: the next one may hear from it.
                    self.run(self.end_when_it_answers(actor, _life_of(name)))
                case actor, facts:
                    found.setdefault(name.split("/")[1], {}).setdefault(_life_of(name), []).append((actor, facts))
        for process_id in found.keys() - self._ids:
            for life, parts in found.pop(process_id).items():
                self.run(self._end_life(life, parts))
        return found

    async def _attached(self, name: str) -> tuple[Any, Facts | None] | None:
        """An actor, and what it says if it answers. Raises RayError where Ray's head gives none: it may still run."""
        try:
            actor = await asyncio.to_thread(ray.get_actor, name)
        except ValueError:
            return None
        try:
            said = await answered(functools.partial(actor.attach.remote, self.launcher), AWAY_LOOKS)
        except ActorDiedError:
            return None
        except TimeoutError:
            return actor, None
        return actor, msgspec.msgpack.decode(said, type=Facts)

    async def _end_life(self, life: str, parts: _Parts) -> None:
        for actor, _ in parts:
            try:
                await self._end(actor)
            except (RayError, TimeoutError):
                self.run(self.end_when_it_answers(actor))
        await asyncio.to_thread(_remove_group, life)

    async def _started(self, spec: ProcessSpec, tell: Tell) -> RayProcess | RayGroup:
        nodes = await asyncio.to_thread(cluster.nodes)
        self.avoided &= {node.labels[NODE_LABEL] for node in nodes}
        usable = [node for node in nodes if node.labels[NODE_LABEL] not in self.avoided]
        wanted, self._near = asks(self._config, usable, self._near)
        ask = wanted[spec.role].avoiding(self.avoided)
        life = f"{self._config.launcher.ray.cluster}/{spec.id}/{uuid.uuid4().hex[:8]}"
        actors = await asyncio.to_thread(_made, life, ask)
        try:
            facts = [await self._placed(actor, spec, ask, tell) for actor in actors]
            specs = [spec] if len(actors) == 1 else await self._parts(spec, actors, facts)
            tell(Placed(spec.id))
            launches = [self._launch(one, there.node, spec) for one, there in zip(specs, facts, strict=True)]
            calls = [
                actor.start.remote(msgspec.msgpack.encode(one)) for actor, one in zip(actors, launches, strict=True)
            ]
            said = await asyncio.wait_for(asyncio.gather(*calls), CALL_TIMEOUT_S)
        except (RayError, TimeoutError, StartError, asyncio.CancelledError):
            for actor in actors:
                await asyncio.to_thread(ray.kill, actor)
            await asyncio.to_thread(_remove_group, life)
            raise
        began = [msgspec.msgpack.decode(one, type=Facts) for one in said]
        return self._life(spec, life, list(zip(actors, began, strict=True)), tell)

    async def _parts(self, spec: ProcessSpec, actors: Sequence[Any], facts: Sequence[Facts]) -> list[ProcessSpec]:
        """The processes of a worker on several nodes, which meet at a port of the leader's."""
        port = await asyncio.wait_for(actors[0].free_port.remote(), CALL_TIMEOUT_S)
        epoch = max(time.time_ns() // 1_000_000, int(spec.environ.get(EPOCH_MIN_VARIABLE, "0")))
        hosts = [one.node for one in facts]
        return [part_of(spec, rank, hosts=hosts, port=port, epoch=epoch) for rank in range(len(actors))]

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

    def _launch(self, spec: ProcessSpec, node: str, whole: ProcessSpec) -> Launch:
        """``whole``: the worker, of which the process may be a part."""
        settings = (*spec.settings, *_address_settings(spec.role, self._config, node))
        if (port := self._ports.get(spec.id)) is not None:
            settings = (*settings, f"scheduler.port={port}")
        return Launch(
            spec=msgspec.structs.replace(spec, settings=settings),
            folder=os.fspath(self._folder),
            config=self._config_text,
            fingerprint=self._fingerprint(whole),
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


def _made(life: str, ask: Ask) -> list[Any]:
    """New actors, which Ray has yet to place: one for each node. Waits for Ray's head."""
    options = {"lifetime": "detached", "max_restarts": 0, "max_task_retries": 0, **ask.options()}
    if ask.nodes == 1:
        return [ray.remote(_OnNode).options(name=life, **options).remote()]
    group = ray.util.placement_group(name=life, lifetime="detached", **ask.bundles())
    options["label_selector"] = None
    actors = []
    for rank in range(ask.nodes):
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, rank)
        actors.append(ray.remote(_OnNode).options(name=f"{life}.{rank}", **options).remote())
    return actors


def _life_of(name: str) -> str:
    """The life of which an actor of this name is the only part, or the part ``.RANK``."""
    return name.partition(".")[0]


def _remove_group(life: str) -> None:
    """Free what Ray holds for a worker on several nodes; others have no group."""
    with contextlib.suppress(ValueError):
        ray.util.remove_placement_group(ray.util.get_placement_group(life))


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
