"""A release of the chart in the tests' cluster, and a backend over it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lightkube import KubeConfig

from launcher.kubernetes.backend import KubernetesBackend, Target
from tests.launcher.kubernetes.cluster_store import RELEASE, ClusterStore
from tests.scheduler.api_server import ApiServer

TARGETS = {pool: Target(kind="Deployment", name=f"{RELEASE}-{pool}") for pool in ("prefill", "decode")}


class Cluster(NamedTuple):
    """One release."""

    store: ClusterStore
    server: ApiServer
    backend: KubernetesBackend


@contextlib.asynccontextmanager
async def running(folder: Path, store: ClusterStore) -> AsyncIterator[Cluster]:
    """One prefill and two decode workers, a scheduler and a front proxy."""
    async with ApiServer(folder, store).listening() as server:
        backend = KubernetesBackend(KubeConfig.from_file(server.kube_config()), RELEASE, TARGETS)
        for pool, replicas in {"scheduler": 1, "prefill": 1, "decode": 2, "front-proxy": 1}.items():
            store.add_pool(pool, replicas)
        try:
            yield Cluster(store, server, backend)
        finally:
            server.troubles.clear()
            await backend.close()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """With every pod ready."""
    async with running(tmp_path, ClusterStore()) as cluster:
        yield cluster
