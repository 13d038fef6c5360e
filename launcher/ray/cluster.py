"""The connection to a Ray cluster, and what is refused in a sentence before any process starts."""

from __future__ import annotations

import contextlib
import os
import site
import threading
import time
from collections.abc import Callable

import grpc
import ray

import baton_llm
from launcher.backend import StartError
from launcher.config import BatonConfig
from launcher.ray.placement import Node, asks, lack, objection

NAMESPACE = "baton"
_ANSWER_TIMEOUT_S = 5.0
_ROOM_INTERVAL_S = 1.0
# The last: something else listens there. A head that wants more than the question is one all the same.
_NO_HEAD = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED)

Say = Callable[[str], None]


def connect(config: BatonConfig, say: Say) -> None:
    """Join the Ray cluster, and wait until it has room for all processes. Raises StartError."""
    setting = config.launcher.ray
    if why := objection(config):
        raise StartError(why)
    address = _address(setting.address)
    try:
        # Ray puts the driver's working folder first on its workers' path, and there modules may have the names of ours.
        with contextlib.chdir("/" if baton_llm.FOLDER in site.getsitepackages() else baton_llm.FOLDER):
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StartError(f"launcher.ray.address={setting.address}: {str(error).splitlines()[0]}") from error
    if not _is_durable():
        say(
            "warning: Ray's head keeps its state in memory: if it is lost for a minute, Ray ends every process; "
            "start it with Redis (docs/ray.md)"
        )
    # What runs already has its room, and is to be supervised even if some of it was lost with its node.
    if not named(config.launcher.ray.cluster):
        _await_room(config, say)


def named(cluster: str) -> list[str]:
    """Names of the actors of a cluster of Baton: ``CLUSTER/PROCESS/LIFE``."""
    return [name for name in ray.util.list_named_actors() if name.startswith(f"{cluster}/")]


def nodes() -> list[Node]:
    """The nodes that live."""
    return [
        Node(address=each["NodeManagerAddress"], resources=each["Resources"], labels=each["Labels"])
        for each in ray.nodes()
        if each["Alive"]
    ]


def _address(given: str) -> str:
    """Of the head that is to be connected to. Raises StartError where none is: Ray itself would try for minutes."""
    from ray._private import services
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    said, address = f"launcher.ray.address={given}", given
    if given == "auto":
        try:
            address = services.get_ray_address_from_environment(given, None)
        except ConnectionError as error:
            why = "no Ray cluster was started on this machine, and RAY_ADDRESS names none"
            raise StartError(f"{said}: {why}") from error
        # An old one may be left in a file.
        said = f"{said}, which is {address}"
    if address.startswith("ray://") or ":" not in address:
        raise StartError(f"{said}: name the head's own port, as in 10.0.0.1:6379")
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return address
    with grpc.insecure_channel(address) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=_ANSWER_TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() in _NO_HEAD:
                why = f"no Ray cluster answers there within {_ANSWER_TIMEOUT_S:g} s"
                raise StartError(f"{said}: {why}") from None
    return address


def _is_durable() -> bool:
    """Whether the head's state outlives it. Ray says which store it uses where it counts its own usage."""
    from ray.experimental import internal_kv

    store = internal_kv._internal_kv_get(b"extra_usage_tag_gcs_storage", namespace=b"usage_stats")
    return store in (b"redis", b"rocksdb")


def _await_room(config: BatonConfig, say: Say) -> None:
    timeout_s = config.launcher.ray.room_timeout_s
    until_s, said = time.monotonic() + timeout_s, False
    while why := _lacking(config):
        if time.monotonic() >= until_s:
            raise StartError(f"{why} after {timeout_s:g} s (launcher.ray.room_timeout_s)")
        if not said:
            said = True
            say(f"{why}; waiting for {timeout_s:g} s (launcher.ray.room_timeout_s)")
        threading.Event().wait(_ROOM_INTERVAL_S)  # nodes may join, and Ray tells this only when asked


def _lacking(config: BatonConfig) -> str:
    living = nodes()
    wanted, _ = asks(config, living)
    return lack(living, list(wanted.values()))
