"""The contract of a backend, over a Ray cluster of several nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launcher.backend import Member, ProcessSpec
from launcher.config import BatonConfig
from launcher.ray.host import RayHost
from tests.launcher.backend_contract import ALL, BackendContract, HostedRig
from tests.launcher.ray.nodes import CLUSTER
from tests.launcher.stand_in import command, kill, told_to_stop


class RayRig(HostedRig):
    def host(self, config: BatonConfig) -> RayHost:
        named = msgspec.structs.replace(config.launcher.ray, cluster=CLUSTER)
        launcher = msgspec.structs.replace(config.launcher, backend="ray", ray=named)
        return RayHost(msgspec.structs.replace(config, launcher=launcher), ALL, command=self._command)

    def _command(self, spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
        return command(spec.id, self.behaviour.get(spec.id, "serves"), self.state_dir)

    def kill(self, member: Member) -> None:
        kill(member)

    def told_to_stop(self) -> list[str]:
        return told_to_stop(self.state_dir)


class TestRay(BackendContract):
    """What only a backend over a host does is the same code over any host, and tested over this machine."""

    @pytest.fixture
    def rig(self, tmp_path: Path, ray_cluster: Any) -> HostedRig:
        return RayRig(tmp_path / "state")
