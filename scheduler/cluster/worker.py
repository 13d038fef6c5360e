"""One worker as the scheduler knows it: what it said, its load, what plans reserve on it. Decides nothing.

Of a worker with several data-parallel ranks each rank is a ``Worker`` too, and plans name ranks: ``worker_group``.

Used blocks are the larger of two counts: what the worker reports, and what is reserved for plans that have not ended.
How long it takes for what it has and gets is predicted by its ``latency`` model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import inf

from scheduler.api.actions import Placement
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.cluster.decode_pace import PromptShare
from scheduler.cluster.latency_model import LatencyModel
from scheduler.cluster.latency_profile import ASSUMED, LatencyProfile
from scheduler.cluster.outlier_detector import WorkerHealth
from scheduler.cluster.prompt_queue import PlanKey, PromptQueue
from scheduler.config import OutlierLimits

# A look-up in an enum takes longer than all the rest of a line, and there is one for every report.
_READY = WorkerState.READY


class Worker:
    """One incarnation. The derived fields are kept current so that policies only read attributes."""

    # Attributes are read a thousand times a plan; slots are the fastest.
    __slots__ = (
        "_itl_slos",
        "_link_latency_s",
        "_places",
        "avoided",
        "block_size_tokens",
        "blocks_total",
        "context_tokens",
        "context_tokens_max",
        "drain_asked",
        "flipping",
        "free_blocks",
        "health",
        "heard_s",
        "idle_since_s",
        "info",
        "itl_slo_s",
        "latency",
        "lease_ids",
        "load",
        "member",
        "placement",
        "prompt_share",
        "prompts",
        "ranks",
        "ready",
        "recovery_reserve",
        "request_count",
        "requests_max",
        "reserved",
        "reserved_blocks",
        "role",
        "session",
        "silent",
        "suspect_until_s",
        "target",
        "transfer_token_s",
        "worker_id",
    )

    def __init__(
        self,
        info: WorkerInfo,
        session: int,
        now_s: float,
        latency: LatencyModel,
        profile: LatencyProfile = ASSUMED,
        health: WorkerHealth | None = None,
        *,
        member: Worker | None = None,
        rank: int | None = None,
    ) -> None:
        """``rank``: it is one of the data-parallel ranks of ``member``."""
        self.info = info
        # What is planned for, reserved on and known to hold prefixes: the worker itself, or each of its ranks.
        self.member = member or self
        self.ranks: Sequence[Worker] = (self,)
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
        # Whether it was told to change its role, and has not registered again.
        self.flipping = False
        # Blocks held here for each plan that has not ended.
        self.reserved: dict[PlanKey, int] = {}
        # Prompts that it is to compute, and the share of its time that those take which it computes as decode worker.
        self.prompts = PromptQueue()
        self.prompt_share = PromptShare()
        # Times between tokens that the clients of its plans ask for, and the least of them.
        self._itl_slos: dict[PlanKey, float] = {}
        self.itl_slo_s = inf
        self.worker_id = info.worker_id
        self.placement = Placement(info.worker_id, info.address, info.epoch, info.registration, rank)
        self.target = self.placement.target
        self.role = info.role
        self.blocks_total = info.kv_blocks_total
        self.block_size_tokens = info.block_size_tokens
        # It says 0 where it has no limit.
        self.context_tokens_max = info.context_tokens_max or sys.maxsize
        self.requests_max = info.requests_max or sys.maxsize
        self.ready = False
        # Blocks held for each running request whose plan is not known here, by a new scheduler.
        self.recovery_reserve = 0
        self.reserved_blocks = 0
        self.free_blocks = info.kv_blocks_total
        # Tokens of the requests that decode here, counted in blocks.
        self.context_tokens = 0
        self.request_count = 0
        self.latency = latency
        self._places = info.topology.split("/") if info.topology else []
        bytes_per_token = info.block_bytes / info.block_size_tokens if info.block_bytes else profile.kv_bytes_per_token
        self._link_latency_s = profile.link.transfer_s(0)
        self.transfer_token_s = profile.link.occupied_s(bytes_per_token)

    @property
    def unusable(self) -> str:
        """Why it gets nothing although it says it is well; empty when it does."""
        return "silent" if self.silent else "ejected" if self.avoided else ""

    @property
    def requests(self) -> int:
        """Requests that it has, on all its ranks."""
        return sum([rank.request_count for rank in self.ranks])

    @property
    def placed(self) -> bool:
        """Whether it is known where it stands."""
        return bool(self._places)

    @property
    def state(self) -> WorkerState:
        """What it reported, or DRAINING from the moment it was asked to drain or to change its role."""
        asked = (self.drain_asked or self.flipping) and self.load.state is _READY
        return WorkerState.DRAINING if asked else self.load.state

    def reserve(self, key: PlanKey, blocks: int, *, itl_slo_s: float = 0.0) -> None:
        """Hold ``blocks`` for a plan. They are free. ``itl_slo_s``: what its client asks for."""
        assert key not in self.reserved, key
        assert 0 < blocks <= self.free_blocks, (key, blocks, self.free_blocks)
        self.reserved[key] = blocks
        self.reserved_blocks += blocks
        if itl_slo_s > 0:
            self._itl_slos[key] = itl_slo_s
            self.itl_slo_s = min(self.itl_slo_s, itl_slo_s)
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

    def assign_prompt(self, key: PlanKey, tokens: int, compute_s: float, now_s: float) -> None:
        """A prompt will be computed here, in about ``compute_s``."""
        self.prompts.add(key, tokens, compute_s, now_s)
        self._refresh()

    def transfer_s(self, tokens: int) -> float:
        """Until the KV of so many tokens has come here from another worker."""
        return self._link_latency_s + tokens * self.transfer_token_s

    def load_s(self, medium: int, tokens: int) -> float:
        """Until so many tokens have come from a medium of its own. 0 before it has loaded any: it will try."""
        for cost in self.load.load_costs:
            if cost.medium == medium:
                return cost.base_s + cost.token_s * tokens
        # A tier that is off.
        return inf

    def levels_from(self, other: Worker) -> int:
        """At how many levels of the topology the two are apart; 0 where one of them is not known."""
        mine, others = self._places, other._places
        if mine == others or not mine or not others:
            return 0
        shared = 0
        for one, another in zip(mine, others, strict=False):
            if one != another:
                break
            shared += 1
        return max(len(mine), len(others)) - shared

    def prompt_wait_s(self, now_s: float) -> float:
        """Until it begins with a prompt that is sent now."""
        prompts = self.prompts
        if not prompts.unknown_tokens:
            return prompts.wait_s(now_s)
        return prompts.wait_s(now_s) + self.latency.prefill_s(prompts.unknown_tokens, 0)

    def forget(self, key: PlanKey, now_s: float) -> None:
        """Drop all that is held for a plan."""
        self.reserved_blocks -= self.reserved.pop(key, 0)
        self.prompts.drop(key, now_s)
        if self._itl_slos.pop(key, inf) == self.itl_slo_s:
            self.itl_slo_s = min(self._itl_slos.values(), default=inf)
        self._refresh()

    def report(self, load: WorkerLoad, now_s: float, visible_after_s: float) -> None:
        """Take over a load report."""
        self.load = load
        self.heard_s = now_s
        self.silent = False
        busy = load.requests_running or load.requests_waiting or load.kv_blocks_used or load.leases_held
        if busy:
            self.idle_since_s = None
        elif self.idle_since_s is None:
            self.idle_since_s = now_s
        self.prompts.reported(load.prefill_tokens_queued, now_s, visible_after_s)
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

    def flip(self, *, going_on: bool) -> None:
        """It is to change its role and takes nothing new meanwhile; or that is given up."""
        self.flipping = going_on
        self._refresh()

    def follow(self, member: Worker) -> None:
        """Take over what concerns the whole worker."""
        self.silent, self.drain_asked, self.flipping = member.silent, member.drain_asked, member.flipping
        self.recovery_reserve = member.recovery_reserve
        self._refresh()

    def _refresh(self) -> None:
        load = self.load
        self.ready = load.state is _READY and not (self.drain_asked or self.flipping or self.silent)
        reported = load.requests_running + load.requests_waiting
        self.request_count = max(reported + self.prompts.unreported, len(self.reserved))
        held = max(self.reserved_blocks, load.kv_blocks_used)
        if self.recovery_reserve:
            held += self.recovery_reserve * max(0, reported - len(self.reserved))
        self.free_blocks = max(0, self.blocks_total - held)
        self.context_tokens = (self.blocks_total - self.free_blocks) * self.block_size_tokens

    def check(self) -> None:
        """Assert that every sum is the sum of its parts."""
        assert self.reserved_blocks == sum(self.reserved.values()), self.worker_id
        assert self.reserved_blocks <= self.blocks_total, self.worker_id
        self.prompts.check()
        assert self.itl_slo_s == min(self._itl_slos.values(), default=inf), self.worker_id
        assert 0 <= self.free_blocks <= self.blocks_total - self.reserved_blocks, self.worker_id
