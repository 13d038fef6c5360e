"""Workers, plans and a core with short names, for the scheduler's tests. Asserts nothing."""

from __future__ import annotations

from typing import Any

from runtime.failures import Failure
from runtime.roles import WorkerRole
from scheduler.api.actions import Action, ReplyPlan, ReplyRefusal
from scheduler.api.events import Event, FrontJoined, PlanRequested, RequestEnded, WorkerJoined, WorkerLoadReported
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.cluster.worker import Worker
from scheduler.config import SchedulerParameters
from scheduler.core import SchedulerCore

FRONT = 1000
BLOCK_TOKENS = 32


def worker_info(worker_id: str, role: WorkerRole | None = None, **changes: Any) -> WorkerInfo:
    """A worker called p… prefills and one called d… decodes, unless told otherwise."""
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "role": role or ("prefill" if worker_id.startswith("p") else "decode"),
        "address": f"{worker_id}:1",
        "epoch": 1,
        "model": "tiny",
        "layout_fingerprint": "same",
        "block_size_tokens": BLOCK_TOKENS,
        "kv_blocks_total": 100,
        "engine_version": "fake",
        **changes,
    }
    return WorkerInfo(**fields)


def ready(**changes: Any) -> WorkerLoad:
    """The load of a ready worker."""
    return WorkerLoad(state=WorkerState.READY, **changes)


def worker(worker_id: str, load: WorkerLoad | None = None, **changes: Any) -> Worker:
    """A worker outside of any core, ready and idle unless told otherwise."""
    made = Worker(worker_info(worker_id, **changes), session=1, now_s=0.0, initial_tokens_per_s=1000.0)
    made.report(load or ready(), 0.0, 0.1)
    return made


class Stage:
    """A core with a clock and one front proxy."""

    def __init__(self, **config: Any) -> None:
        # No request waits and no worker counts as silent unless a test is about that.
        self.core = SchedulerCore(SchedulerParameters(**{"waiting_max": 0, "silence_timeout_s": 1e9, **config}))
        self.now_s = 0.0
        self._sessions = 0
        self._plans = 0
        self.session_of: dict[str, int] = {}
        self.do(FrontJoined(session=FRONT, front_proxy_id="front-0"))

    def do(self, event: Event) -> list[Action]:
        """Let the core handle it, and check its invariants."""
        actions = list(self.core.handle(event, self.now_s))
        self.core.check()
        return actions

    def join(self, worker_id: str, role: WorkerRole | None = None, **changes: Any) -> list[Action]:
        """Register a worker on a new stream."""
        self._sessions += 1
        actions = self.do(WorkerJoined(session=self._sessions, info=worker_info(worker_id, role, **changes)))
        if not any(type(action).__name__ == "RejectWorker" for action in actions):
            self.session_of[worker_id] = self._sessions
        return actions

    def report(self, worker_id: str, load: WorkerLoad | None = None) -> list[Action]:
        """Report a load, by default ready and idle."""
        return self.do(
            WorkerLoadReported(session=self.session_of[worker_id], worker_id=worker_id, load=load or ready())
        )

    def enter(self, worker_id: str, role: WorkerRole | None = None, **changes: Any) -> None:
        """Register and report ready."""
        self.join(worker_id, role, **changes)
        self.report(worker_id)

    def ask(self, prompt_tokens: int = 64, output_tokens_max: int = 32, **changes: Any) -> ReplyPlan | ReplyRefusal:
        """Ask for a plan under the next free plan id."""
        self._plans += 1
        fields = {"prompt_tokens": prompt_tokens, "output_tokens_max": output_tokens_max, **changes}
        (reply,) = self.do(question(self._plans, **fields))
        assert isinstance(reply, ReplyPlan | ReplyRefusal)
        return reply

    def plan(self, prompt_tokens: int = 64, output_tokens_max: int = 32, **changes: Any) -> ReplyPlan:
        """Ask for a plan that must be granted."""
        reply = self.ask(prompt_tokens, output_tokens_max, **changes)
        assert isinstance(reply, ReplyPlan), reply
        return reply

    def refusal(self, prompt_tokens: int = 64, output_tokens_max: int = 32, **changes: Any) -> Failure:
        """Ask for a plan that must be refused."""
        reply = self.ask(prompt_tokens, output_tokens_max, **changes)
        assert isinstance(reply, ReplyRefusal), reply
        return reply.failure

    def end(self, plan: ReplyPlan) -> None:
        """End a request."""
        self.do(RequestEnded(session=plan.session, plan_id=plan.plan_id))

    def reserved(self, worker_id: str) -> int:
        """Blocks reserved on a worker."""
        return self.core.cluster.workers[worker_id].reserved_blocks


def where(plan: ReplyPlan) -> tuple[str | None, str | None, str]:
    """Prefill worker, decode worker and reason."""
    prefill = plan.prefill.worker_id if plan.prefill else None
    return prefill, plan.decode.worker_id if plan.decode else None, plan.reason


def restarted(**config: Any) -> Stage:
    """A scheduler that has just begun, to which one front proxy has reconnected, and no worker."""
    made = Stage(**config)
    made.core = SchedulerCore(made.core._config, began_s=0.0)
    made.do(FrontJoined(session=FRONT, front_proxy_id="front-0"))
    return made


def question(plan_id: int, **changes: Any) -> PlanRequested:
    """A question: one tenth of a worker, unless told otherwise."""
    fields = {"session": FRONT, "request_id": f"r{plan_id}", "prompt_tokens": 288, "output_tokens_max": 32, **changes}
    return PlanRequested(plan_id=plan_id, **fields)
