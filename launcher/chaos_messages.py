"""Which messages between Baton's processes may come a second time, and why. Reads messages; sends none. Pure.

A gRPC stream keeps the order and repeats nothing, so nothing is doubled here because a network might do it. What can
come twice is what Baton says again by itself: as a sign of life, from time to time, for several reasons at once, or on
the next stream while the last one is still open at its other end. Within a stream such a message is doubled at its own
place: the protocol lets slots be used again, and a list of what runs is true only until the next change. Who opens a
stream, and what is numbered within one, comes again on another stream only; the relay sees to that as well.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from google.protobuf.message import DecodeError, Message

from protos.scheduler.v1 import scheduler_pb2
from protos.worker.v1 import worker_pb2

Direction = Literal["up", "down"]
"""From the caller to who is called, or back."""

WORKER_SESSION = "/baton.scheduler.v1.SchedulerService/WorkerSession"
FRONT_SESSION = "/baton.scheduler.v1.SchedulerService/FrontSession"
ATTACH = "/baton.worker.v1.WorkerService/Attach"


class Kind(msgspec.Struct, frozen=True):
    """One kind of message of one stream. ``field`` is which of the oneof ``message`` is set."""

    method: str
    direction: Direction
    field: str
    twice: bool
    """Whether it may come twice in a row."""
    why: str


KINDS: tuple[Kind, ...] = (
    Kind(WORKER_SESSION, "up", "register", False, "once a stream; again on the next one"),
    Kind(WORKER_SESSION, "up", "load", True, "every heartbeat says it again"),
    Kind(WORKER_SESSION, "up", "leaving", True, "the end of the stream says it again"),
    Kind(WORKER_SESSION, "up", "leases", True, "every heartbeat says it again"),
    Kind(WORKER_SESSION, "down", "registered", True, "said again as a sign of life"),
    Kind(WORKER_SESSION, "down", "drain", True, "who drains already goes on draining"),
    Kind(FRONT_SESSION, "up", "register", False, "once a stream; again on the next one"),
    Kind(FRONT_SESSION, "up", "plan", False, "its number is new in its stream; asked again on the next one"),
    Kind(FRONT_SESSION, "up", "ended", True, "told when patience ends, and when the request does"),
    Kind(FRONT_SESSION, "up", "suspect", True, "every request that suffered says it"),
    Kind(FRONT_SESSION, "up", "running", True, "told from time to time, and after every silence"),
    Kind(FRONT_SESSION, "down", "plan", False, "one answer to one question; asked again, it is another plan"),
    Kind(FRONT_SESSION, "down", "refused", False, "one answer to one question"),
    Kind(FRONT_SESSION, "down", "view", True, "the whole cluster each time, also as a sign of life"),
    Kind(FRONT_SESSION, "down", "waiting", False, "once a question, before its answer"),
    Kind(ATTACH, "up", "open", False, "once a stream; again on the next one"),
    Kind(ATTACH, "up", "submit", False, "its slot must be free, and its request's name new"),
    Kind(ATTACH, "up", "abort", True, "may meet a request that has just ended"),
    Kind(ATTACH, "up", "release", True, "may meet a lease that has ended by itself"),
    Kind(ATTACH, "up", "renew", True, "said again for as long as decode waits"),
    Kind(ATTACH, "down", "opened", False, "once a stream, its first message"),
    Kind(ATTACH, "down", "step", False, "tokens: a stream repeats none, and nobody sends one again"),
)
STREAMS = frozenset(kind.method for kind in KINDS)
"""Streams whose caller opens the next one as soon as it has lost one."""

_TYPES: dict[tuple[str, Direction], type[Message]] = {
    (WORKER_SESSION, "up"): scheduler_pb2.WorkerUpdate,
    (WORKER_SESSION, "down"): scheduler_pb2.WorkerCommand,
    (FRONT_SESSION, "up"): scheduler_pb2.FrontUpdate,
    (FRONT_SESSION, "down"): scheduler_pb2.FrontReply,
    (ATTACH, "up"): worker_pb2.AttachRequest,
    (ATTACH, "down"): worker_pb2.AttachResponse,
}
_TWICE = frozenset((kind.method, kind.direction, kind.field) for kind in KINDS if kind.twice)


def may_come_twice(method: str, direction: Direction, data: bytes) -> bool:
    """Whether this very message may be passed on a second time. What nobody knows may not."""
    message = _read(method, direction, data)
    return message is not None and (method, direction, message.WhichOneof("message")) in _TWICE


def caller(method: str, data: bytes) -> str:
    """Which process speaks, from the first message of its stream; empty where that does not say."""
    match _read(method, "up", data):
        case scheduler_pb2.WorkerUpdate(register=worker):
            return worker.worker_id
        case scheduler_pb2.FrontUpdate(register=front):
            return front.front_proxy_id
        case worker_pb2.AttachRequest(open=opened):
            return opened.front_proxy_id
        case _:
            return ""


def _read(method: str, direction: Direction, data: bytes) -> Message | None:
    made = _TYPES.get((method, direction))
    if made is None:
        return None
    message = made()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    return message
