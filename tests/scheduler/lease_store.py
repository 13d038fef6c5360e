"""What Kubernetes' API server does with Leases, as far as can be seen from outside: versions, conflicts, refusals."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

NAMESPACE = "serving"
PATH = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"

_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


class Answer(NamedTuple):
    """Of the API server. ``stream``: lines that follow for as long as it goes on."""

    status: int
    body: bytes
    stream: AsyncGenerator[bytes] | None = None


class LeaseStore:
    """The Leases of one namespace."""

    def __init__(self) -> None:
        self.leases: dict[str, dict[str, Any]] = {}
        self._versions = itertools.count(1)

    def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Do one request."""
        status, said = self.do(method, path, json.loads(body) if body else {})
        return Answer(status, json.dumps(said).encode())

    def do(self, method: str, path: str, lease: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer."""
        if not path.startswith(PATH):
            return failure(404, "NotFound", f"no such namespace: {path}")
        if lease and (problem := _problem(lease)):
            return failure(422, "Invalid", problem)
        match method:
            case "GET":
                found = self.leases.get(path.rpartition("/")[2])
                return (200, found) if found is not None else failure(404, "NotFound", "there is no such lease")
            case "POST":
                if lease["metadata"]["name"] in self.leases:
                    return failure(409, "AlreadyExists", "it already exists")
                assert "resourceVersion" not in lease["metadata"], "resourceVersion should not be set on creation"
                return 201, self._keep(lease, uid=f"uid-{next(self._versions)}")
            case "PUT":
                assert path == f"{PATH}/{lease['metadata']['name']}"
                return self._put(lease)
            case _:
                return failure(405, "MethodNotAllowed", method)

    def _put(self, lease: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        metadata = lease["metadata"]
        present = self.leases.get(metadata["name"])
        if present is None:
            # A Lease may be created by an update, but not one that had another uid.
            if "uid" in metadata:
                return failure(409, "Conflict", "Precondition failed: UID in precondition")
            return 201, self._keep(lease, uid=f"uid-{next(self._versions)}")
        if not metadata.get("resourceVersion"):
            return failure(422, "Invalid", "metadata.resourceVersion: must be specified for an update")
        if metadata.get("uid", present["metadata"]["uid"]) != present["metadata"]["uid"]:
            return failure(409, "Conflict", "Precondition failed: UID in precondition")
        if metadata["resourceVersion"] != present["metadata"]["resourceVersion"]:
            return failure(409, "Conflict", "the object has been modified")
        if lease == present:
            return 200, present
        return 200, self._keep(lease, uid=present["metadata"]["uid"])

    def _keep(self, lease: dict[str, Any], *, uid: str) -> dict[str, Any]:
        metadata = {**lease["metadata"], "uid": uid, "resourceVersion": str(next(self._versions))}
        kept = {**lease, "metadata": metadata}
        self.leases[metadata["name"]] = kept
        return kept


def _problem(lease: dict[str, Any]) -> str:
    """What the API server would refuse."""
    spec = lease["spec"]
    if (lease.get("apiVersion"), lease.get("kind")) != ("coordination.k8s.io/v1", "Lease"):
        return "it is no Lease"
    if type(spec.get("leaseDurationSeconds", 1)) is not int or spec.get("leaseDurationSeconds", 1) <= 0:
        return "spec.leaseDurationSeconds: must be greater than 0"
    if type(spec.get("leaseTransitions", 0)) is not int or not 0 <= spec.get("leaseTransitions", 0) < 2**31:
        return "spec.leaseTransitions: must be greater than or equal to 0"
    for name in ("acquireTime", "renewTime"):
        if name in spec and not _MICRO_TIME.fullmatch(spec[name]):
            return f"spec.{name}: cannot be parsed as a MicroTime"
    return ""


def failure(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}
