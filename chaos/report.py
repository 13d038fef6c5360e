"""What a chaos run found: the verdict, everything it rests on, and how it is told. Finds nothing out itself."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from chaos.schedule import FaultKind
from chaos.traffic import Counts
from chaos.usage import UsageFound
from simulation.faults.invariants import Invariant


class FaultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One fault and what the traffic saw while it lasted."""

    kind: FaultKind
    process_id: str
    # None: it was not whole again in time.
    recovered_after_s: float | None
    # Connections that were cut, delayed or black-holed.
    disturbed: int
    requests: int
    failed: int
    repeated: int


class NotBack(msgspec.Struct, frozen=True, kw_only=True):
    """A process that did not serve when the run ended without a verdict of the traffic."""

    process_id: str
    state: str
    why: str
    log: str
    log_tail: list[str]


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict and everything it rests on."""

    seed: int
    passed: bool
    # Why the run ended before its time; empty: it did not.
    error: str = ""
    not_back: list[NotBack] = msgspec.field(default_factory=list)
    counts: Counts = msgspec.field(default_factory=Counts)
    faults: list[FaultRecord] = msgspec.field(default_factory=list)
    # None: no process answered.
    leases_left: int | None = None
    blocks_left: int | None = None
    # None: nothing is counted.
    usage: UsageFound | None = None
    # What processes said on /metrics that they may not say, by the invariant that it breaks.
    broken: dict[Invariant, list[str]] = msgspec.field(default_factory=dict)
    exit_code: int = 0


def judged(report: ChaosReport) -> dict[Invariant, bool]:
    """Whether each invariant that can be seen from outside held; none where the run ended before its time."""
    if report.error:
        return {}
    counts = report.counts
    nothing_left = not (report.leases_left or report.blocks_left)
    billed = {} if report.usage is None else {Invariant.BILLED: Invariant.BILLED not in report.broken}
    return {
        Invariant.TOKENS: not counts.wrong,
        Invariant.UNDISTURBED: not counts.wrong,
        Invariant.UNNOTICED: counts.failed == counts.wrong,
        Invariant.RETURNED: nothing_left and Invariant.RETURNED not in report.broken,
        Invariant.QUEUES: Invariant.QUEUES not in report.broken,
        Invariant.RETRIES: Invariant.RETRIES not in report.broken,
        **billed,
    }


def as_text(report: ChaosReport) -> str:
    """The form for people; the verdict is its last line."""
    return "\n".join(_lines(report))


def _lines(report: ChaosReport) -> Iterator[str]:
    counts = report.counts
    seen = f"{counts.failed} failed, {counts.wrong} with wrong answers, {counts.repeated} repeated by their client"
    yield f"{counts.requests} requests, {counts.tokens} tokens: {seen}"
    if counts.kinds:
        yield "  of them " + ", ".join(f"{count} {kind}" for kind, count in sorted(counts.kinds.items()))
    for kind, count in counts.left_out.items():
        yield f"  {count} of kind {kind} were left out: undisturbed, their two answers differed"
    if report.leases_left is not None:
        yield f"after the traffic: {report.leases_left} leases and {report.blocks_left} KV blocks held"
    if report.usage is not None:
        yield f"{report.usage.records} usage records, {report.usage.estimated} of them estimated"
    for failure in counts.failures:
        yield f"  request {failure.request} ({failure.kind}) at {failure.at_s} s: {failure.what}"
    for invariant, whats in report.broken.items():
        yield from (f"  {invariant}: {what}" for what in whats)
    for invariant, held in judged(report).items():
        yield f"{'held  ' if held else 'BROKEN'} {invariant}"
    if report.error:
        yield f"ended early: {report.error}"
    for process in report.not_back:
        why = f" ({process.why})" if process.why else ""
        yield f"{process.process_id} is {process.state}{why}; the last lines of {process.log}:"
        yield from (f"    {line}" for line in process.log_tail)
    verdict = "passed" if report.passed else "FAILED"
    yield f"{verdict} (seed {report.seed}, {len(report.faults)} faults, `baton up` ended with {report.exit_code})"
