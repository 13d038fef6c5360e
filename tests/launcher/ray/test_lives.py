"""What is asked of an actor and how long, and the processes of a worker on several nodes. Ray is asked for nothing."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from launcher.backend import ProcessSpec
from launcher.config import RayConfig
from launcher.ray import cluster, host, lives
from launcher.ray.host import RayHost
from launcher.ray.lives import answered, part_of
from tests.launcher.backend_contract import CONFIG

CLUSTER = "test"


class Actor:
    """Gives these answers in turn; a number: "late", after so many seconds."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)

    async def ask(self) -> Any:
        answer = next(self._answers)
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            return "late"
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_a_look_without_rays_head_fails_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    async def end(_host: RayHost, _actor: Any, life: str) -> None:
        ended.append(life)

    async def silent(_ask: Any, _looks: int) -> Any:
        raise TimeoutError

    def get_actor(name: str) -> Any:
        if name in failures:
            raise failures[name]
        return Mock()

    failures = {f"{CLUSTER}/decode-1/1": GetTimeoutError("head"), f"{CLUSTER}/decode-2/2": ValueError("ended")}
    names = [f"{CLUSTER}/decode-0/0", *failures]
    monkeypatch.setattr(cluster, "named", lambda _: names)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(host, "answered", silent)
    monkeypatch.setattr(RayHost, "end_when_it_answers", end)
    section = msgspec.structs.replace(CONFIG.launcher, backend="ray", ray=RayConfig(cluster=CLUSTER))
    looking = RayHost(msgspec.structs.replace(CONFIG, launcher=section), ["decode-0", "decode-1", "decode-2"])
    with pytest.raises(GetTimeoutError):
        await looking._find()
    assert not looking._jobs
    # The next look finds out about each.
    del failures[names[1]]
    assert await looking._find() == {}
    await asyncio.gather(*looking._jobs)
    assert ended == names[:2]


async def test_an_actor_that_is_away_is_lost_sooner_than_one_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lives, "_LOOK_S", 0.05)
    monkeypatch.setattr(lives, "_RETRY_S", 0.0)
    away = ActorUnavailableError("away", None)
    assert await answered(Actor(away, "news").ask) == "news"
    # A wait begins when the one before is over, however late that is: a launcher that stood still waits once more.
    assert await answered(Actor(away, 0.075).ask) == "late"
    with pytest.raises(TimeoutError):
        await answered(Actor(away, 0.275).ask)
    assert await answered(Actor(0.275).ask) == "late"
    with pytest.raises(TimeoutError):
        await answered(Actor(60.0).ask)


async def test_an_actor_that_ray_has_declared_dead_is_asked_once() -> None:
    with pytest.raises(ActorDiedError):
        await answered(Actor(ActorDiedError()).ask)


def test_the_first_node_runs_the_worker_and_the_others_ranks_of_its_engine() -> None:
    spec = ProcessSpec(
        id="decode-0", role="decode", settings=("worker.worker_id=decode-0",), environ={"BATON_EPOCH_MIN": "7"}
    )
    leader, follower = (part_of(spec, rank, hosts=["10.0.0.2", "10.0.0.3"], port=4242, epoch=9) for rank in (0, 1))
    assert (leader.id, leader.command) == ("decode-0", "decode")
    assert (follower.id, follower.command) == ("decode-0.1", "engine-node")
    shared = {
        "worker.worker_id=decode-0",
        "engine.args.nnodes=2",
        "engine.args.master_addr=10.0.0.2",
        "engine.args.master_port=4242",
        "engine.args.distributed_executor_backend=mp",
    }
    assert {*leader.settings} == shared | {"engine.args.node_rank=0"}
    assert {*follower.settings} == shared | {"engine.args.node_rank=1"}
    assert leader.environ == {"BATON_EPOCH_MIN": "7", "BATON_EPOCH": "9", "VLLM_HOST_IP": "10.0.0.2"}
    assert follower.environ["VLLM_HOST_IP"] == "10.0.0.3"
