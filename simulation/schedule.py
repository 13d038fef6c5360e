"""Which fault hits which process, in which order: the one schedule of `baton chaos` and of the simulation.

Pure: the same seed gives the same schedule to both. Breaks nothing; whoever performs a fault matches on its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal, assert_never, get_args

import msgspec

# As launcher.process_plan has it, which is above this package.
Role = Literal["scheduler", "prefill", "decode", "front_proxy"]
FaultKind = Literal[
    "kill", "freeze", "terminate", "restart", "cut", "delay", "blackhole", "duplicate", "late", "disk_full"
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
# What happens to connections, whatever they carry, and what happens to single messages.
CONNECTION_KINDS: frozenset[FaultKind] = frozenset({"cut", "delay", "blackhole"})
MESSAGE_KINDS: frozenset[FaultKind] = frozenset({"duplicate", "late"})
NETWORK_KINDS: frozenset[FaultKind] = CONNECTION_KINDS | MESSAGE_KINDS


class Target(msgspec.Struct, frozen=True):
    """A process that may be hit."""

    process_id: str
    role: Role


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong, once ``after_requests`` more requests have ended since the cluster was whole."""

    kind: FaultKind
    process_id: str
    role: Role
    after_requests: int


def replaces(kind: FaultKind) -> bool:
    """Whether the process that is hit ends, so that it is whole again only as another one."""
    match kind:
        case "kill" | "terminate" | "restart" | "disk_full":
            return True
        case "freeze" | "cut" | "delay" | "blackhole" | "duplicate" | "late":
            return False
        case _:
            assert_never(kind)


def schedule(
    seed: int, targets: Sequence[Target], kinds: Sequence[FaultKind], *, rounds: int, after_requests_max: int
) -> list[Fault]:
    """Every kind hits every target once a round, in an order drawn from ``seed``.

    One fault at a time: the next comes when the cluster is whole again, at a moment drawn from ``seed`` as well.
    """
    assert rounds >= 1
    assert after_requests_max >= 1
    chooser = Random(seed)
    faults: list[Fault] = []
    for _ in range(rounds):
        pairs = [(kind, target) for kind in kinds for target in targets]
        chooser.shuffle(pairs)
        faults += [
            Fault(
                kind=kind,
                process_id=target.process_id,
                role=target.role,
                after_requests=chooser.randint(1, after_requests_max),
            )
            for kind, target in pairs
        ]
    return faults
