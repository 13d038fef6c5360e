"""Finds leaked leases: held by a worker for a request that no front proxy runs. Pure; frees nothing itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from scheduler.api.actions import ReportLeak


class _Unknown(msgspec.Struct):
    since_s: float
    told: bool = False


def request_of(lease_id: str) -> str:
    """The request behind a lease: workers name leases after their orders, ``<request>-p<attempt>``."""
    return lease_id.rpartition("-")[0] or lease_id


class LeaseAuditor:
    """Watches the oldest leases of each worker, so its memory is bounded by what workers report."""

    def __init__(self, leak_after_s: float) -> None:
        self._leak_after_s = leak_after_s
        self._unknown: dict[str, dict[str, _Unknown]] = {}

    def forget(self, worker_id: str) -> None:
        """A worker left, and its KV with it."""
        self._unknown.pop(worker_id, None)

    def look(
        self, worker_id: str, lease_ids: Sequence[str], running: Collection[str], now_s: float
    ) -> Sequence[ReportLeak]:
        """The leaks found now for the first time, of leases held while these requests run."""
        before = self._unknown.get(worker_id, {})
        unknown = {
            lease_id: before.get(lease_id) or _Unknown(now_s)
            for lease_id in lease_ids
            if request_of(lease_id) not in running
        }
        self._unknown[worker_id] = unknown
        found = []
        for lease_id, each in unknown.items():
            unknown_for_s = now_s - each.since_s
            if unknown_for_s >= self._leak_after_s and not each.told:
                each.told = True
                found.append(
                    ReportLeak(
                        worker_id=worker_id,
                        lease_id=lease_id,
                        request_id=request_of(lease_id),
                        unknown_for_s=unknown_for_s,
                    )
                )
        return found

    def leaked(self) -> Mapping[str, int]:
        """Leaks held now, by worker."""
        return {worker_id: sum(each.told for each in leases.values()) for worker_id, leases in self._unknown.items()}
