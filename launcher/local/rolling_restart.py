"""The order of a rolling restart, and when a process that came back is whole again. Restarts nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from launcher.local import status
from launcher.local.process_plan import ProcessSpec, Role
from launcher.local.state_file import ClusterRecord

# The scheduler first: it runs no request, and every worker that comes back later registers with the new one.
_ORDER: tuple[Role, ...] = ("scheduler", "prefill", "decode", "front_proxy")


class Step(msgspec.Struct, frozen=True):
    """One step of a restart. ``pid`` is of the process that ends, or of its successor; 0: none runs."""

    id: str
    what: Literal["stopping", "ready"]
    pid: int


def in_order(specs: Iterable[ProcessSpec]) -> list[ProcessSpec]:
    """Whom to restart after whom."""
    return sorted(specs, key=lambda spec: _ORDER.index(spec.role))


async def settled(
    spec: ProcessSpec,
    record: Callable[[], ClusterRecord],
    *,
    within_s: float,
    look_interval_s: float,
    ask_timeout_s: float,
) -> str:
    """Wait until the others have found a process that came back; what is wrong, or nothing.

    Workers say that they are ready when they are registered, and front proxies when they can serve. A scheduler says it
    when it listens: whoever else is ready must have registered with the one that leads before anybody may go. That may
    be another one, for which this one stands by now.
    """
    if spec.role != "scheduler":
        return ""
    try:
        async with asyncio.timeout(within_s):
            while True:
                now = record()
                schedulers = [process for process in now.processes if process.role == "scheduler"]
                asked = [status.ask(one.grpc_address, timeout_s=ask_timeout_s) for one in schedulers]
                said = dict(zip((one.id for one in schedulers), await asyncio.gather(*asked), strict=True))
                registered = [each.workers_registered for each in said.values() if each and each.state == "ready"]
                if said[spec.id] is not None and max(registered, default=-1) >= _ready_workers(now):
                    return ""
                # The launcher hears of its processes' starts and ends; who has found whom, a scheduler tells only
                # those who ask.
                await asyncio.sleep(look_interval_s)
    except TimeoutError:
        return f"came back, but within {within_s:g} s not every worker has registered with a scheduler that leads"


def _ready_workers(record: ClusterRecord) -> int:
    return sum(process.role in ("prefill", "decode") and process.state == "ready" for process in record.processes)
