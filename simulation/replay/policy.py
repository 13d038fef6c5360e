"""The interface by which the replay takes any policy: events in, decisions out, as in ``scheduler.core``. Pure.

A policy is told what workers report to a scheduler in production, at production's intervals, and what follows from its
own decisions. It is never told how long an output will be, and it gets no function of the simulator.

Order of events: every ``WorkerRegistered`` comes before the first request. Of one instant, a worker's ``KvChanged``
comes before its ``LoadReported``. ``RequestEnded`` is the last event of a request that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from scheduler.api.chance import Random
from scheduler.api.worker_info import WorkerInfo, WorkerLoad
from scheduler.api.worker_progress import EngineStep


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is known of a request when it comes.

    ``block_keys``: one for each full block of ``key_tokens`` prompt tokens. Keys are chained: the same key means the
    same prompt up to the end of its block. ``ttft_slo_s`` and ``itl_slo_s``: what the client asks for; 0: nothing.
    """

    request_id: int
    arrived_s: float
    prompt_tokens: int
    block_keys: tuple[int, ...] = ()
    key_tokens: int
    output_tokens_max: int
    priority_class: str = "default"
    tenant: str = ""
    ttft_slo_s: float = 0.0
    itl_slo_s: float = 0.0


# Events


class WorkerRegistered(msgspec.Struct, frozen=True, gc=False):
    """A worker joined: its role, block size, capacity and limits."""

    info: WorkerInfo


class LoadReported(msgspec.Struct, frozen=True, gc=False):
    """A worker said what it is doing. ``steps``: its last ones since its last report, oldest first, bounded."""

    worker_id: str
    load: WorkerLoad
    steps: tuple[EngineStep, ...] = ()


class KvChanged(msgspec.Struct, frozen=True, gc=False):
    """What changed of the blocks that a worker holds, since it last said so. No key is in both."""

    worker_id: str
    stored: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()


class RequestArrived(msgspec.Struct, frozen=True, gc=False):
    """A request asks where to run. The policy answers this event with one decision about it, ``Wait`` included."""

    request: Request


class FirstToken(msgspec.Struct, frozen=True, gc=False):
    """A request's first token was sent. ``cached_tokens``: prompt tokens that the computing worker already held."""

    request_id: int
    cached_tokens: int


class RequestEnded(msgspec.Struct, frozen=True, gc=False):
    """A request that ran is over. ``finished``: with its whole output; else it failed."""

    request_id: int
    output_tokens: int
    finished: bool = True


class Tick(msgspec.Struct, frozen=True, gc=False):
    """Time passed: comes every ``scheduler.config.SchedulerParameters.tick_interval_s``."""


PolicyEvent = WorkerRegistered | LoadReported | KvChanged | RequestArrived | FirstToken | RequestEnded | Tick


# Decisions


class Run(msgspec.Struct, frozen=True, gc=False):
    """Compute the prompt on ``prefill`` and hand over to ``decode``; whole on ``decode`` where ``prefill`` is None."""

    request_id: int
    prefill: str | None
    decode: str


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Not yet. A later event is answered with ``Run`` or ``Refuse``."""

    request_id: int


class Refuse(msgspec.Struct, frozen=True, gc=False):
    """Not at all. ``cause``: a short label for the report."""

    request_id: int
    cause: str


Decision = Run | Wait | Refuse


class Policy(Protocol):
    """Decides where requests run."""

    def handle(self, event: PolicyEvent, now_s: float) -> Sequence[Decision]:
        """What follows from one event: any number of decisions, about any requests that have come or wait."""
        ...


MakePolicy = Callable[[Random], Policy]
"""Makes a fresh policy for one run. Its chance comes from the seed of the run."""
