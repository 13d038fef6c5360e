"""Which fault hits which process, in which order: the one schedule of `baton chaos` and of the simulation.

Pure: the same seed gives the same schedule to both. Breaks nothing itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from random import Random
from typing import Literal, get_args

import msgspec

FaultKind = Literal["kill", "freeze", "terminate", "restart", "cut", "delay", "blackhole"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
# What happens to a process's connections and not to the process itself.
NETWORK_KINDS: frozenset[FaultKind] = frozenset({"cut", "delay", "blackhole"})
# What ends the process, so that a new one must replace it.
ENDING_KINDS: frozenset[FaultKind] = frozenset({"kill", "terminate", "restart"})
# At most this many requests end between two faults.
AFTER_REQUESTS_MAX = 8
# Clients, unless it is said otherwise.
USERS = 6


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong, once ``after_requests`` more requests have ended since the cluster was whole."""

    kind: FaultKind
    process_id: str
    after_requests: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long a fault lasts, and how much a delay is."""

    freeze_s: float = 20.0
    """how long a process stands still"""
    cut_s: float = 3.0
    """how long its connections are cut and new ones are refused"""
    delay_s: float = 10.0
    """how long its connections are slow"""
    delay_ms: float = 200.0
    """by how much they are slow, each way"""
    blackhole_s: float = 20.0
    """how long its connections stay open and carry nothing"""


def may_repeat(fault: Fault | None, front_proxy_id: str) -> bool:
    """Whether this fault ends that front proxy. Only then may a client see its connection break, and ask elsewhere.

    Clients notice it even if there is another front proxy, which cannot answer on the broken connection.
    """
    return fault is not None and fault.process_id == front_proxy_id and fault.kind in ENDING_KINDS


def schedule(seed: int, process_ids: Sequence[str], kinds: Sequence[FaultKind], *, rounds: int) -> list[Fault]:
    """Every kind hits every process once a round, in an order drawn from ``seed``.

    One fault at a time: the next comes when the cluster is whole again, at a moment drawn from ``seed`` as well.
    In which order kinds and processes are named does not matter.
    """
    chooser = Random(seed)
    kinds = [kind for kind in FAULT_KINDS if kind in kinds]
    faults: list[Fault] = []
    for _ in range(rounds):
        pairs = [(kind, process_id) for kind in kinds for process_id in sorted(process_ids)]
        chooser.shuffle(pairs)
        faults += [
            Fault(kind=kind, process_id=process_id, after_requests=chooser.randint(1, AFTER_REQUESTS_MAX))
            for kind, process_id in pairs
        ]
    return faults
