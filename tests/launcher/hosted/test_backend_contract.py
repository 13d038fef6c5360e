"""The contract of a backend, over a host in memory and over this machine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.backend import BecameReady, Ended, Member, Placed, ProcessSpec, Tell, Waiting
from launcher.config import BatonConfig
from launcher.local.host import LOGS, LocalHost
from launcher.local.ports import HeldPorts
from tests.launcher.backend_contract import HostedContract, HostedRig, member, seen
from tests.launcher.stand_in import command, kill, told_to_stop


class FakeProcess:
    """One life in memory."""

    node = ""

    def __init__(self, process_id: str, pid: int, behaviour: str, host: FakeHost, tell: Tell) -> None:
        self.id, self.pid, self.start_ticks = process_id, pid, 1
        self._behaviour = behaviour
        self._host = host
        self._tell = tell
        self._ended = asyncio.Event()
        if behaviour == "fails":
            self.end(3)
        elif behaviour != "loads":
            tell(BecameReady(process_id, {"address": f"127.0.0.1:{pid}"}))

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def end(self, code: int) -> None:
        if self.running:
            self._ended.set()
            self._tell(Ended(self.id, code))

    async def stop(self, *, drain_s: float, timeout_s: float) -> bool:
        if self._behaviour != "serves":
            self.end(-9)
            return False
        self._host.stopped.append(self.id)
        self.end(0)
        return True

    def kill(self) -> None:
        self.end(-9)

    async def ended(self) -> None:
        await self._ended.wait()


class FakeHost:
    """Processes that are only remembered."""

    def __init__(self, behaviour: dict[str, str]) -> None:
        self._behaviour = behaviour
        self._pids = itertools.count(1)
        self.lives: dict[str, FakeProcess] = {}
        self.stopped: list[str] = []

    async def start(self, spec: ProcessSpec, tell: Tell) -> FakeProcess:
        assert spec.id not in self.lives or not self.lives[spec.id].running
        behaviour = self._behaviour.get(spec.id, "serves")
        if behaviour == "waits":
            tell(Waiting(spec.id, "waits for room"))
            await asyncio.Event().wait()
        if behaviour == "taken over":
            tell(Placed(spec.id, taken_over=True))
        life = self.lives[spec.id] = FakeProcess(spec.id, next(self._pids), behaviour, self, tell)
        return life

    def log(self, process_id: str) -> str:
        return process_id

    async def logs(self, process_id: str, lines: int) -> Sequence[str]:
        return ["noise on stdout"][:lines]

    def stays_down(self, process_id: str) -> None:
        pass

    def close(self) -> None:
        pass


class FakeRig(HostedRig):
    def host(self, config: BatonConfig) -> FakeHost:
        self._host = FakeHost(self.behaviour)
        return self._host

    def kill(self, member: Member) -> None:
        self._host.lives[member.id].kill()

    def told_to_stop(self) -> list[str]:
        return self._host.stopped


class LocalRig(HostedRig):
    def host(self, config: BatonConfig) -> LocalHost:
        (self.state_dir / LOGS).mkdir()
        return LocalHost(config, self.state_dir, ports=HeldPorts(), command=self._command)

    def _command(self, spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
        return command(spec.id, self.behaviour.get(spec.id, "serves"), self.state_dir)

    def kill(self, member: Member) -> None:
        kill(member)

    def told_to_stop(self) -> list[str]:
        return told_to_stop(self.state_dir)


class TestFake(HostedContract):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> HostedRig:
        return FakeRig(tmp_path / "state")

    async def test_what_was_taken_over_waits_for_none_without_room_and_that_one_can_be_retired(
        self, hosted: HostedRig
    ) -> None:
        hosted.behaviour |= {"decode-0": "taken over", "decode-1": "waits"}
        async with hosted.up() as backend:
            assert (await member(backend, "decode-1")).state == "pending"
            await backend.set_replicas("decode", 1)
            await seen(backend, "decode-1", "ended")
            assert (await member(backend, "decode-0")).state == "ready"


class TestLocal(HostedContract):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> HostedRig:
        return LocalRig(tmp_path / "state")
