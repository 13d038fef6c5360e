"""One Ray cluster for all tests here: a head without cores and three nodes, all on the loopback address."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.launcher.ray.nodes import CPUS

NODES = 3
# Ray's own switch for clusters on the loopback address. Ray reads it when it is imported, here and in its processes.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Connected to under the namespace of `baton up`."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    store = str(tmp_path_factory.mktemp("head"))
    os.environ |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": store}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(NODES):
        cluster.add_node(num_cpus=CPUS)
    ray.init(address=cluster.address, namespace="baton", log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
