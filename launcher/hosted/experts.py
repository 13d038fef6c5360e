"""What `baton experts` asks the scheduler of a running cluster, and how it waits for a change. Decides nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc

from launcher.hosted import state_file
from launcher.hosted.operator_commands import CommandError, schedulers
from launcher.hosted.timing import Timing
from protos.experts.v1 import experts_pb2 as pb
from scheduler.operator_client import change_experts, show_experts

# A plan for hundreds of ranks takes seconds.
CHANGE_TIMEOUT_S = 60.0
# Longer than the scheduler lets a rollout last.
ROLLOUT_TIMEOUT_S = 180.0
_LOOK_INTERVAL_S = 0.2
_OVER = ("idle", "diverged")


async def groups(state_dir: Path) -> list[pb.Group]:
    """Every group of ranks, by worker. Raises CommandError or StateError."""
    addresses = schedulers(state_file.read(state_dir))
    try:
        told = await show_experts(addresses, timeout_s=Timing().status_timeout_s)
    except grpc.aio.AioRpcError as error:
        raise CommandError(error.details() or error.code().name) from error
    if not told.groups:
        raise CommandError("no engine runs experts in parallel: there is nothing to place")
    return sorted(told.groups, key=lambda group: str(group.worker_id))


async def group(state_dir: Path, worker: str) -> pb.Group:
    """The group of ``worker``, or the only one where it is empty. Raises CommandError or StateError."""
    found = await groups(state_dir)
    chosen = [each for each in found if worker in ("", each.worker_id)]
    if len(chosen) != 1:
        raise CommandError(f"--worker: say which of {', '.join(each.worker_id for each in found)}")
    return chosen[0]


async def ask(state_dir: Path, request: pb.ChangeGroupRequest) -> pb.ChangeGroupResponse:
    """Plan or begin a change. Raises CommandError or StateError."""
    addresses = schedulers(state_file.read(state_dir))
    try:
        return await change_experts(addresses, request, timeout_s=CHANGE_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise CommandError(error.details() or error.code().name) from error


async def change(state_dir: Path, request: pb.ChangeGroupRequest) -> pb.Group:
    """Begin a change, and wait until it is over: the group then. Raises CommandError if it did not go live."""
    before = await group(state_dir, request.worker_id)
    begun = await ask(state_dir, request)
    if request.WhichOneof("what") == "apply_best" and not begun.HasField("map"):
        return before
    until_s = time.monotonic() + ROLLOUT_TIMEOUT_S
    while time.monotonic() < until_s:
        after = await group(state_dir, request.worker_id)
        if after.phase in _OVER and after.live_version != before.live_version:
            return after
        if after.phase in _OVER and after.rollouts_ended != before.rollouts_ended:
            raise CommandError(f"{request.worker_id} is as it was: {after.ended_why}")
        await asyncio.sleep(_LOOK_INTERVAL_S)  # the change is other processes' doing, and the scheduler says how far
    raise CommandError(f"{request.worker_id}: the change is not over after {ROLLOUT_TIMEOUT_S:g} s")
