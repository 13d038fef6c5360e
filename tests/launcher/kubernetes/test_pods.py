"""What a pod says of its process, one table."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from lightkube.resources.core_v1 import Pod

from launcher.kubernetes.pods import is_replica, member_of

CONTAINER: dict[str, Any] = {"name": "worker", "image": "", "imageID": "", "ready": False, "restartCount": 2}
RUNNING = {**CONTAINER, "state": {"running": {}}}
READY = {"type": "Ready", "status": "True"}
NO_NODE = {
    "type": "PodScheduled",
    "status": "False",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
}


def pod(status: dict[str, Any], *, leaving: bool = False, **labels: str) -> Pod:
    metadata: dict[str, Any] = {"name": "blue-decode-x", "uid": "u", "labels": {"baton/pool": "decode", **labels}}
    if leaving:
        metadata["deletionTimestamp"] = "2026-12-01T00:00:00Z"
    return msgspec.convert({"metadata": metadata, "spec": {"containers": []}, "status": status}, Pod)


def container(**state: Any) -> dict[str, Any]:
    return {"phase": "Pending", "containerStatuses": [{**CONTAINER, **state}]}


ENDED = {"terminated": {"exitCode": 3}}


@pytest.mark.parametrize(
    ("status", "state", "why"),
    [
        ({}, "pending", ""),
        ({"phase": "Pending", "conditions": [NO_NODE]}, "pending", NO_NODE["message"]),
        (
            container(state={"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}),
            "pending",
            "ImagePullBackOff: no such image",
        ),
        (
            container(state={"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}, lastState=ENDED),
            "pending",
            "CrashLoopBackOff: ended with exit code 3",
        ),
        (container(state=ENDED), "pending", "ended with exit code 3"),
        ({"phase": "Running", "containerStatuses": [RUNNING]}, "starting", ""),
        ({"phase": "Running", "containerStatuses": [RUNNING], "conditions": [READY]}, "ready", ""),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, "ended", "low on memory"),
        ({**container(state=ENDED), "phase": "Failed"}, "ended", "ended with exit code 3"),
    ],
)  # fmt: skip
def test_a_pod_says_how_its_process_is(status: dict[str, Any], state: str, why: str) -> None:
    member = member_of(pod(status))
    assert (member.id, member.pool, member.state, member.why) == ("blue-decode-x", "decode", state, why)
    assert member.incarnation == ("u.2" if state in ("starting", "ready") else "")
    assert member_of(pod(status, leaving=True)).state == "draining"


def test_the_first_pod_of_a_group_is_the_replica() -> None:
    rank = "leaderworkerset.sigs.k8s.io/worker-index"
    assert [is_replica(pod({}, leaving=False, **{rank: index})) for index in "012"] == [True, False, False]
    assert is_replica(pod({}))
