"""What a pod says of the process in it. Pure; asks no API server."""

from __future__ import annotations

from collections.abc import Container

from lightkube.models.core_v1 import ContainerStatus, PodStatus
from lightkube.resources.core_v1 import Pod

from launcher.backend import Member, MemberState

RELEASE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
POOL = "baton/pool"
"""Labels that the chart gives every pod; workers alone have a pool."""
ZONE = "topology.kubernetes.io/zone"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Annotation: of a Deployment that shrinks, the pod with the lowest goes first. 0 where it is missing."""
_RANK = "leaderworkerset.sigs.k8s.io/worker-index"


def is_replica(pod: Pod) -> bool:
    """Whether it is a replica of its own, and no further pod of a group."""
    return labels(pod).get(_RANK, "0") == "0"


def member_of(pod: Pod) -> Member:
    """The process in a pod. A container that is started again in the same pod is another life."""
    status = pod.status or PodStatus()
    container = next(iter(status.containerStatuses or ()), None)
    state, why = _state(pod, status, container)
    runs = container is not None and container.state is not None and container.state.running is not None
    return Member(
        id=name(pod),
        pool=labels(pod).get(POOL) or labels(pod).get(COMPONENT, ""),
        incarnation=f"{_uid(pod)}.{container.restartCount}" if runs and container is not None else "",
        state=state,
        address=status.podIP or "",
        node=(pod.spec.nodeName if pod.spec is not None else None) or "",
        zone=labels(pod).get(ZONE, ""),
        why=why,
    )


def _state(pod: Pod, status: PodStatus, container: ContainerStatus | None) -> tuple[MemberState, str]:
    conditions = {condition.type: condition for condition in status.conditions or ()}
    if is_leaving(pod):
        return "draining", ""
    if status.phase in ("Succeeded", "Failed"):
        return "ended", status.message or status.reason or _end(container)
    if container is not None and container.state is not None and container.state.running is not None:
        ready = conditions.get("Ready")
        return ("ready" if ready is not None and ready.status == "True" else "starting"), ""
    if (scheduled := conditions.get("PodScheduled")) is not None and scheduled.status == "False":
        return "pending", scheduled.message or scheduled.reason or ""
    waiting = container.state.waiting if container is not None and container.state is not None else None
    if waiting is None:
        return "pending", _end(container)
    return "pending", ": ".join(text for text in (waiting.reason, _end(container) or waiting.message) if text)


def _end(container: ContainerStatus | None) -> str:
    """How the process ended last. Empty: it did not."""
    for state in (container.state, container.lastState) if container is not None else ():
        if state is not None and state.terminated is not None:
            return f"ended with exit code {state.terminated.exitCode}"
    return ""


def name(pod: Pod) -> str:
    """Of the pod; workers have it as their id."""
    assert pod.metadata is not None and pod.metadata.name is not None
    return pod.metadata.name


def pod_of(worker_id: str, names: Container[str]) -> str:
    """The name of a worker's pod: its id, or of two workers in one pod their id without the role behind it."""
    return worker_id if worker_id in names else worker_id.rpartition("-")[0]


def labels(pod: Pod) -> dict[str, str]:
    """Of the pod."""
    return (pod.metadata.labels if pod.metadata is not None else None) or {}


def goes_first(pod: Pod) -> bool:
    """Whether it was said of it that it is to go before others."""
    annotations: dict[str, str] = (pod.metadata.annotations if pod.metadata is not None else None) or {}
    return annotations.get(DELETION_COST, "0").startswith("-")


def is_leaving(pod: Pod) -> bool:
    """Whether it was told to end."""
    return pod.metadata is not None and pod.metadata.deletionTimestamp is not None


def _uid(pod: Pod) -> str:
    return (pod.metadata.uid if pod.metadata is not None else None) or ""
