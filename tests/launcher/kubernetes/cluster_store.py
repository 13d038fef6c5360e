"""What a cluster of Kubernetes does with pools of pods, as seen from outside: its API, controller and kubelet.

By the facts that were tried on a real API server: which pod goes first, versions, conflicts, refusals, watches. Time
passes faster here: a pod that does not listen is killed after ``GRACE_S``.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.scheduler.lease_store import NAMESPACE, Answer, LeaseStore, failure

GRACE_S = 0.05
RELEASE = "blue"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
COST = "controller.kubernetes.io/pod-deletion-cost"
Object = dict[str, Any]
POOL_LABELS = {"prefill": "baton/pool", "decode": "baton/pool"}


class ClusterStore(LeaseStore):
    """One namespace. ``behaviour``: of pods by name, "serves" unless told otherwise, "fails", "loads" or "deaf"."""

    def __init__(self) -> None:
        super().__init__()
        self.behaviour: dict[str, str] = {}
        self.forbidden: set[str] = set()
        """Such as "update deployments/scale"."""
        self.budget_is_spent = False
        self.conflicts = 0
        """Of the next writes of a scale so many come too late."""
        self.asked: list[str] = []
        """Verbs and resources, in order."""
        self.ended_by_itself: list[str] = []
        self.pods: dict[str, Object] = {}
        self._workloads: dict[tuple[str, str], Object] = {}
        self._deaf: set[str] = set()
        self._made: dict[str, int] = {}
        self._history: list[tuple[int, str, Object]] = []
        self._oldest = 0
        self._watch_end: tuple[int, int] = (0, 0)
        self._wake = asyncio.Event()

    def add_pool(self, pool: str, replicas: int, plural: str = "deployments") -> None:
        """A workload named after the release, and its pods."""
        self._workloads[plural, f"{RELEASE}-{pool}"] = {"pool": pool, "replicas": replicas, "version": self._next()}
        self._reconcile(pool)

    def replicas(self, pool: str) -> int:
        """As its scale says."""
        return int(self._workload(pool)["replicas"])

    def end_watches(self, code: int = 0) -> None:
        """End all that run: 0: as after their time; 410: versions so far are forgotten; else with this error."""
        if code == 410:
            self._oldest, self._history = self._next(), []
        self._watch_end = (self._watch_end[0] + 1, code)
        self._wake.set()

    def restart_container(self, name: str) -> None:
        """The process in it died; the pod stays."""
        status = self.pods[name]["status"]["containerStatuses"][0]
        status["restartCount"] += 1
        self._run(name)

    # The API

    def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        parts = urlsplit(path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if "/leases" in parts.path:
            return super().ask(method, parts.path, body)
        name, _, action = parts.path.partition(f"/namespaces/{NAMESPACE}/")[2].partition("/")[2].partition("/")
        plural = parts.path.partition(f"/namespaces/{NAMESPACE}/")[2].partition("/")[0]
        verb = {"GET": "get", "PUT": "update", "POST": "create", "PATCH": "patch"}[method]
        if not name:
            verb = "watch" if "watch" in query else "list"
        what = f"{verb} {plural}/{action}" if action else f"{verb} {plural}"
        self.asked.append(what)
        if what in self.forbidden:
            who = f"system:serviceaccount:{NAMESPACE}:operator"
            return _answer(failure(403, "Forbidden", f'{plural} "{name}" is forbidden: User "{who}" cannot {what}'))
        if verb == "watch":
            return Answer(200, b"", self._watch(_selector(query), int(query["resourceVersion"])))
        if action == "log":
            lines = ["noise before", "noise on stdout"][-int(query["tailLines"]) :]
            return Answer(200, "".join(f"{line}\n" for line in lines).encode())
        given = json.loads(body) if body else {}
        if action == "scale":
            return _answer(self._scale(plural, name, given))
        return _answer(self._on_pods(verb, name, action, given, _selector(query)))

    def _on_pods(
        self, verb: str, name: str, action: str, given: Object, labels: Mapping[str, str]
    ) -> tuple[int, Object]:
        if verb == "list":
            items = [pod for pod in self.pods.values() if _matches(pod, labels)]
            return 200, {"kind": "PodList", "metadata": {"resourceVersion": str(self._next())}, "items": items}
        if name not in self.pods:
            return failure(404, "NotFound", f'pods "{name}" not found')
        if action == "eviction":
            if self.budget_is_spent:
                message = "Cannot evict pod as it would violate the pod's disruption budget."
                return failure(429, "TooManyRequests", message)
            self._delete(name)
            self._reconcile(_pool(self.pods[name]))
            return 201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
        if verb == "patch":
            annotations = self.pods[name]["metadata"].setdefault("annotations", {})
            for key, value in given["metadata"]["annotations"].items():
                annotations.pop(key, None) if value is None else annotations.update({key: value})
            self._changed(name)
        return 200, self.pods[name]

    def _scale(self, plural: str, name: str, given: Object) -> tuple[int, Object]:
        workload = self._workloads.get((plural, name))
        if workload is None:
            return failure(404, "NotFound", f'{plural} "{name}" not found')
        if given:
            if self.conflicts:
                self.conflicts -= 1
                workload["version"] = self._next()
            if given["metadata"]["resourceVersion"] != str(workload["version"]):
                return failure(409, "Conflict", "the object has been modified; please apply your changes")
            workload |= {"replicas": given["spec"].get("replicas", 0), "version": self._next()}
            self._reconcile(workload["pool"])
        metadata = {"name": name, "namespace": NAMESPACE, "resourceVersion": str(workload["version"])}
        # As in Go, 0 is left out; and an API of others may leave out what holds nothing.
        spec = {"spec": {"replicas": workload["replicas"]}} if workload["replicas"] else {}
        return 200, {"apiVersion": "autoscaling/v1", "kind": "Scale", "metadata": metadata, **spec}

    async def _watch(self, labels: Mapping[str, str], version: int) -> AsyncGenerator[bytes]:
        begun = self._watch_end[0]
        while True:
            if version < self._oldest:
                yield _line("ERROR", failure(410, "Expired", "too old resource version")[1])
                return
            self._wake.clear()
            for at, kind, pod in list(self._history):
                if at > version:
                    version = at
                    if _matches(pod, labels):
                        yield _line(kind, pod)
            if self._history and self._history[-1][0] > version:
                continue
            if self._watch_end[0] != begun:
                if code := self._watch_end[1]:
                    yield _line("ERROR", failure(code, "Timeout", "Too large resource version")[1])
                return
            await self._wake.wait()

    # Its controller and kubelet

    def _workload(self, pool: str) -> Object:
        return next(each for each in self._workloads.values() if each["pool"] == pool)

    def _reconcile(self, pool: str) -> None:
        wanted = self.replicas(pool)
        here = [pod for pod in self.pods.values() if _pool(pod) == pool and "deletionTimestamp" not in pod["metadata"]]
        for _ in range(wanted - len(here)):
            self._create(pool)
        for pod in sorted(here, key=_goes_later)[: max(0, len(here) - wanted)]:
            self._delete(pod["metadata"]["name"])

    def _create(self, pool: str) -> None:
        ordinal = self._made[pool] = self._made.get(pool, -1) + 1
        name = f"{pool}-{ordinal}"
        labels = {"app.kubernetes.io/instance": RELEASE, POOL_LABELS.get(pool, "app.kubernetes.io/component"): pool}
        self.pods[name] = {
            "metadata": {"name": name, "namespace": NAMESPACE, "uid": f"uid-{self._next()}", "labels": labels},
            "spec": {"nodeName": "node-1", "containers": [{"name": "worker"}]},
            "status": {"phase": "Pending", "containerStatuses": [_container({"waiting": {"reason": "Creating"}})]},
        }
        self._changed(name, "ADDED")
        asyncio.get_running_loop().call_soon(self._run, name)

    def _run(self, name: str) -> None:
        if name not in self.pods:
            return
        status, behaviour = self.pods[name]["status"], self.behaviour.get(name, "serves")
        self._deaf.discard(name)
        if behaviour == "deaf":
            self._deaf.add(name)
        container = status["containerStatuses"][0]
        if behaviour == "fails":
            container["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
            container["lastState"] = {"terminated": {"exitCode": 3}}
        else:
            container["state"] = {"running": {}}
        ready = str(behaviour in ("serves", "deaf"))
        status |= {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": ready}]}
        self._changed(name)

    def _delete(self, name: str) -> None:
        self.pods[name]["metadata"]["deletionTimestamp"] = "2026-12-01T00:00:00Z"
        self._changed(name)
        loop = asyncio.get_running_loop()
        if name in self._deaf:
            loop.call_later(GRACE_S, self._gone, name, False)
        else:
            loop.call_soon(self._gone, name, True)

    def _gone(self, name: str, listened: bool) -> None:
        if listened:
            self.ended_by_itself.append(name)
        self._changed(name, "DELETED")
        del self.pods[name]

    def _changed(self, name: str, kind: str = "MODIFIED") -> None:
        at = self._next()
        self.pods[name]["metadata"]["resourceVersion"] = str(at)
        self._history.append((at, kind, copy.deepcopy(self.pods[name])))
        self._wake.set()

    def _next(self) -> int:
        return next(self._versions)


def _container(state: Object) -> Object:
    return {"name": "worker", "image": "", "imageID": "", "ready": False, "restartCount": 0, "state": state}


def _pool(pod: Object) -> str:
    labels: Mapping[str, str] = pod["metadata"]["labels"]
    return labels.get("baton/pool") or labels["app.kubernetes.io/component"]


def _goes_later(pod: Object) -> tuple[bool, int, int]:
    """As the controller of ReplicaSets orders: one that is not ready first, then by cost, then the newest."""
    ready = pod["status"].get("conditions", [{"status": "False"}])[0]["status"] == "True"
    cost = int(pod["metadata"].get("annotations", {}).get(COST, "0"))
    return ready, cost, -int(pod["metadata"]["name"].rpartition("-")[2])


def _selector(query: Mapping[str, str]) -> Mapping[str, str]:
    return dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)


def _matches(pod: Object, labels: Mapping[str, str]) -> bool:
    return labels.items() <= pod["metadata"]["labels"].items()


def _line(kind: str, about: Object) -> bytes:
    return json.dumps({"type": kind, "object": about}).encode() + b"\n"


def _answer(done: tuple[int, Object]) -> Answer:
    return Answer(done[0], json.dumps(done[1]).encode())
