"""What a process does in the cluster. `baton status` and the metrics show these words."""

from __future__ import annotations

from typing import Literal, get_args

WorkerRole = Literal["prefill", "decode"]
Role = Literal["scheduler", WorkerRole, "front_proxy"]

WORKER_ROLES: tuple[WorkerRole, ...] = get_args(WorkerRole)
ROLES: tuple[Role, ...] = get_args(Role)
