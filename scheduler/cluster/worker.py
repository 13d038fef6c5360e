"""One worker as the scheduler knows it: what it said, its load, what plans reserve on it. Decides nothing.

Used blocks are the larger of two counts: what the worker reports, and what is reserved for plans that have not ended.
Between a plan and the first report that includes it, the plan's prompt is counted here as unreported work.
"""

from __future__ import annotations

from scheduler.api.actions import Placement
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.cluster.outlier_detector import WorkerHealth
from scheduler.cluster.prefill_speed import PrefillSpeed
from scheduler.config import OutlierLimits

PlanKey = tuple[int, int]


class Worker:
    """One incarnation. The derived fields are kept current so that policies only read attributes."""

    def __init__(
        self,
        info: WorkerInfo,
        session: int,
        now_s: float,
        initial_tokens_per_s: float,
        health: WorkerHealth | None = None,
    ) -> None:
        self.info = info
        self.session = session
        self.load = WorkerLoad()
        self.heard_s = now_s
        # The leases it has held longest, as it last named them, and since when it has nothing to do.
        self.lease_ids: tuple[str, ...] = ()
        self.idle_since_s: float | None = None
        # Not heard of for so long that it gets nothing new.
        self.silent = False
        self.health = health or WorkerHealth(OutlierLimits())
        self.avoided = self.health.avoided
        self.suspect_until_s = float("-inf")
        # Whether an operator asked it to drain. Holds until this incarnation ends.
        self.drain_asked = False
        # Blocks held here for each plan that has not ended.
        self.reserved: dict[PlanKey, int] = {}
        # Prompts sent here that no load report includes yet: (planned at, tokens), oldest first.
        self.unreported: dict[PlanKey, tuple[float, int]] = {}
        self.worker_id = info.worker_id
        self.placement = Placement(info.worker_id, info.address, info.epoch)
        self.role = info.role
        self.blocks_total = info.kv_blocks_total
        self.block_size_tokens = info.block_size_tokens
        self.context_tokens_max = info.context_tokens_max
        self.requests_max = info.requests_max
        self.ready = False
        # Blocks held for each running request whose plan is not known here, by a new scheduler.
        self.recovery_reserve = 0
        self.reserved_blocks = 0
        self.unreported_tokens = 0
        self.free_blocks = info.kv_blocks_total
        self.request_count = 0
        self.queued_tokens = 0
        self.speed = PrefillSpeed(initial_tokens_per_s, now_s)

    @property
    def unusable(self) -> str:
        """Why it gets nothing although it says it is well; empty when it does."""
        return "silent" if self.silent else "ejected" if self.avoided else ""

    @property
    def state(self) -> WorkerState:
        """What it reported, or DRAINING from the moment it was asked to drain."""
        asked = self.drain_asked and self.load.state is WorkerState.READY
        return WorkerState.DRAINING if asked else self.load.state

    def reserve(self, key: PlanKey, blocks: int) -> None:
        """Hold ``blocks`` for a plan. The caller has seen that they are free."""
        assert key not in self.reserved, key
        assert 0 < blocks <= self.free_blocks, (key, blocks, self.free_blocks)
        self.reserved[key] = blocks
        self.reserved_blocks += blocks
        self._refresh()

    def adopt(self, key: PlanKey, blocks: int) -> None:
        """Hold blocks for a plan that runs here already; less where they are not all there any more."""
        assert key not in self.reserved, key
        blocks = min(blocks, self.blocks_total - self.reserved_blocks)
        self.reserved[key] = blocks
        self.reserved_blocks += blocks
        self._refresh()

    def reserve_for_recovery(self, blocks_per_request: int) -> None:
        """From now on keep so many blocks for every running request whose plan is not known; 0 ends it."""
        self.recovery_reserve = blocks_per_request
        self._refresh()

    def assign_prefill(self, key: PlanKey, tokens: int, now_s: float) -> None:
        """Count a prompt that will be computed here until a load report includes it."""
        assert key not in self.unreported, key
        self.unreported[key] = (now_s, tokens)
        self.unreported_tokens += tokens
        self.speed.assigned(tokens)
        self._refresh()

    def forget(self, key: PlanKey) -> None:
        """Drop all that is held for a plan."""
        self.reserved_blocks -= self.reserved.pop(key, 0)
        self.unreported_tokens -= self.unreported.pop(key, (0.0, 0))[1]
        self._refresh()

    def report(self, load: WorkerLoad, now_s: float, visible_after_s: float, *, remembered: bool = False) -> None:
        """Take over a load report. How fast a worker computes is not learnt from one that is only remembered."""
        self.load = load
        self.heard_s = now_s
        self.silent = False
        busy = load.requests_running or load.requests_waiting or load.kv_blocks_used or load.leases_held
        if busy:
            self.idle_since_s = None
        elif self.idle_since_s is None:
            self.idle_since_s = now_s
        visible = []
        for key, (planned_s, _) in self.unreported.items():
            if planned_s + visible_after_s > now_s:
                break
            visible.append(key)
        for key in visible:
            self.unreported_tokens -= self.unreported.pop(key)[1]
        if not remembered:
            self.speed.reported(load.prefill_tokens_queued, now_s)
        self._refresh()

    def forgive(self, seconds: float, now_s: float) -> None:
        """Subtract time in which the scheduler itself stood still from the worker's silence."""
        self.heard_s = max(self.heard_s, min(self.heard_s + seconds, now_s))

    def fall_silent(self) -> None:
        """Take nothing new until the next report."""
        self.silent = True
        self._refresh()

    def judge(self) -> None:
        """Take over what its health says."""
        self.avoided = self.health.avoided

    def drain(self) -> None:
        """Take nothing new from now on, whatever the next report says."""
        self.drain_asked = True
        self._refresh()

    def _refresh(self) -> None:
        load = self.load
        self.ready = load.state is WorkerState.READY and not self.drain_asked and not self.silent
        reported = load.requests_running + load.requests_waiting
        self.request_count = max(reported + len(self.unreported), len(self.reserved))
        self.queued_tokens = load.prefill_tokens_queued + self.unreported_tokens
        held = max(self.reserved_blocks, load.kv_blocks_used)
        if self.recovery_reserve:
            held += self.recovery_reserve * max(0, reported - len(self.reserved))
        self.free_blocks = max(0, self.blocks_total - held)

    def check(self) -> None:
        """Assert that every sum is the sum of its parts."""
        assert self.reserved_blocks == sum(self.reserved.values()), self.worker_id
        assert self.reserved_blocks <= self.blocks_total, self.worker_id
        assert self.unreported_tokens == sum(tokens for _, tokens in self.unreported.values()), self.worker_id
        assert 0 <= self.free_blocks <= self.blocks_total - self.reserved_blocks, self.worker_id
        assert self.speed.tokens_per_s > 0, self.worker_id
