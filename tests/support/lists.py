"""Messages between processes as they travel: in lists."""

from __future__ import annotations

from typing import Any

from protos.scheduler.v1 import scheduler_pb2
from protos.worker.v1 import worker_pb2

LISTS: dict[type, type] = {
    scheduler_pb2.FrontUpdate: scheduler_pb2.FrontUpdates,
    scheduler_pb2.FrontReply: scheduler_pb2.FrontReplies,
    scheduler_pb2.WorkerUpdate: scheduler_pb2.WorkerUpdates,
    scheduler_pb2.WorkerCommand: scheduler_pb2.WorkerCommands,
    worker_pb2.AttachRequest: worker_pb2.AttachRequests,
}


def listed(*messages: Any) -> Any:
    """One list of them; they are of one kind."""
    return LISTS[type(messages[0])](messages=messages)
