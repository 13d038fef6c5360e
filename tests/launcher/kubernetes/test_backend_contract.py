"""The contract of a backend, over the tests' API server of Kubernetes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from launcher.backend import Member
from launcher.kubernetes.backend import KubernetesBackend
from tests.launcher.backend_contract import BackendContract, Rig, ready
from tests.launcher.kubernetes.cluster_store import ClusterStore
from tests.launcher.kubernetes.conftest import running


class KubernetesRig(Rig):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._store = ClusterStore()
        self._store.behaviour = self.behaviour

    def kill(self, member: Member) -> None:
        self._store.restart_container(member.id)

    def told_to_stop(self) -> list[str]:
        return self._store.ended_by_itself

    @contextlib.asynccontextmanager
    async def up(self, **settings: float) -> AsyncIterator[KubernetesBackend]:
        async with running(self._folder, self._store) as cluster:
            await ready(cluster.backend, "front-proxy", 1)
            yield cluster.backend


class TestKubernetes(BackendContract):
    @pytest.fixture
    def rig(self, tmp_path: Path) -> Rig:
        return KubernetesRig(tmp_path)
