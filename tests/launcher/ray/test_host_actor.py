"""The actor that owns one process, without Ray: it is a plain class."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec

from launcher.backend import BecameReady, Ended, ProcessSpec
from launcher.ray.host_actor import Facts, HostActor, Launch, Taken, decoded, environment
from tests.launcher.stand_in import command

SPEC = ProcessSpec(id="decode-0", role="decode", environ={"BATON_EPOCH_MIN": "7"})


def launch(folder: Path, behaviour: str = "serves") -> Launch:
    program = tuple(command("decode-0", behaviour, folder))
    return Launch(
        spec=SPEC, folder=str(folder), config="{}", fingerprint="f", environ={"HF_TOKEN": "t"}, program=program
    )


async def started(folder: Path) -> tuple[HostActor, Facts]:
    actor = HostActor("10.0.0.2", "n1")
    await actor.attach("first")
    said = await actor.start(msgspec.msgpack.encode(launch(folder)))
    return actor, msgspec.msgpack.decode(said, type=Facts)


async def test_it_tells_what_happens_to_its_process_from_wherever_it_is_asked(tmp_path: Path) -> None:
    actor, facts = await started(tmp_path)
    assert (facts.node, facts.running, facts.fingerprint) == ("10.0.0.2", True, "f")
    [ready] = decoded(await actor.news("first", 0))
    assert isinstance(ready, BecameReady)
    waiting = asyncio.create_task(actor.news("first", 1))
    os.kill(facts.pid, signal.SIGKILL)
    assert decoded(await waiting) == [Ended("decode-0", -9)]
    assert decoded(await actor.news("first", 0)) == [ready, Ended("decode-0", -9)]
    await actor.ended()
    assert await actor.logs(1) == ["noise on stdout"]
    assert (tmp_path / "decode-0").stat().st_mode & 0o077 == 0


async def test_it_obeys_only_the_launcher_that_attached_last(tmp_path: Path) -> None:
    actor, facts = await started(tmp_path)
    assert len(await actor.news("first", 0)) == 1
    waiting = asyncio.create_task(actor.news("first", 1))
    await asyncio.sleep(0)
    again = msgspec.msgpack.decode(await actor.attach("second"), type=Facts)
    assert decoded(await waiting) == [Taken()]
    assert (again.pid, again.running, again.addresses["address"]) == (facts.pid, True, "127.0.0.1:2")
    await actor.kill("first")
    assert await actor.stop("first", 0.0, 0.0)
    assert msgspec.msgpack.decode(await actor.attach("second"), type=Facts).running
    assert await actor.stop("second", 5.0, 10.0)
    assert decoded(await actor.news("second", 1)) == [Ended("decode-0", 0)]


def test_a_process_gets_its_nodes_environment_without_what_ray_and_baton_set() -> None:
    node = {
        "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "1", "RAY_JOB_ID": "1", "SPT_NOENV": "1",
        "PYTHONBREAKPOINT": "ray.util.rpdb.set_trace", "BATON_LAUNCHER__DECODE": "9", "HF_TOKEN": "of the node",
    }  # fmt: skip
    child = environment(node, launch(Path("/nowhere")))
    gone = {"OMP_NUM_THREADS", "RAY_JOB_ID", "SPT_NOENV", "PYTHONBREAKPOINT", "BATON_LAUNCHER__DECODE"}
    assert gone.isdisjoint(child)
    assert {name: child[name] for name in ("PATH", "CUDA_VISIBLE_DEVICES", "HF_TOKEN", "BATON_EPOCH_MIN")} == {
        "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", "HF_TOKEN": "t", "BATON_EPOCH_MIN": "7",
    }  # fmt: skip
    assert child["BATON_CHILD"] == "1", "it ends with the actor"
