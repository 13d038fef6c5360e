"""How the parts of the accounting say something to a front proxy."""

from __future__ import annotations

from collections.abc import Callable

from protos.scheduler.v1 import scheduler_pb2 as pb

Send = Callable[[int, pb.FrontReply], None]
"""Sends a reply to one front proxy's session, if it is still open."""
