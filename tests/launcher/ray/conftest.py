"""One Ray cluster for all tests here: a head without cores and three nodes, all on the loopback address."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.hosted import status
from launcher.ray.host_actor import folder_of
from protos.cluster.v1 import cluster_pb2
from tests.launcher.ray.nodes import CLUSTER, CPUS, mentioning

NODES = 3
# Ray's own switch for clusters on the loopback address. Ray reads it when it is imported, here and in its processes.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
_STORE_BYTES = 80 << 20
"""The least that Ray takes for the objects of a node. Baton has none there."""


@pytest.fixture(autouse=True)
def _schedulers_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins do not, and a scheduler that is silent for long is killed."""

    async def ask(*_: object, **__: object) -> cluster_pb2.ProcessStatus:
        return cluster_pb2.ProcessStatus()

    monkeypatch.setattr(status, "ask", ask)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """Connected to under the namespace of `baton up`. Leaves no process, no file and no shared memory behind."""
    # A short name: Ray makes unix sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    before = dict(os.environ)
    os.environ |= {
        "RAY_TMPDIR": str(folder),
        # What a process on a node that is killed leaves in its temporary folder goes with ours.
        "TMPDIR": str(folder),
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(folder / "head"),
    }
    try:
        yield from _running()
        assert mentioning(str(folder)) == {}
    finally:
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(folder_of(CLUSTER), ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    assert not folder.exists()


def _running() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": _STORE_BYTES, "include_log_monitor": False, "dashboard_agent_listen_port": None}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "no_monitor": True, **small},
    )
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=CPUS, wait=False, **small)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, namespace="baton", log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
