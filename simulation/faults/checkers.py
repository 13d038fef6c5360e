"""What must hold in every run, whatever went wrong. Looks, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from front_proxy.request.flow import EVENT_LOG_MAX
from front_proxy.request.stall_detector import Awaited
from runtime.failures import FailureKind
from simulation.faults.fault_kinds import Faults
from simulation.faults.invariants import Invariant, hold

# How long a scheduler may take to learn of a plan, with every message late.
TOLD_S_MAX = 0.5
# From the moment a scheduler counts as silent until it is dialled again, where the run is long enough to see that.
REDIAL_S_MAX = 2.0

if TYPE_CHECKING:
    from simulation.faults.clients import Client
    from simulation.faults.cluster import SimCluster
    from simulation.faults.processes import FrontProcess, SchedulerProcess, WorkerProcess


def check_bounds(cluster: SimCluster) -> None:
    """Nothing grows beyond what the requests account for. Holds at any moment."""
    for scheduler in cluster.schedulers.values():
        if scheduler.leads:
            scheduler.shell.core.check()
            if scheduler.shell.accounting is not None and scheduler.shell.accounting.usage is not None:
                scheduler.shell.accounting.usage.treasury.check()
    for front in cluster.fronts:
        if not front.alive:
            continue
        dispatcher, limits = front.dispatcher, front.limits
        unanswered = front.plans.plan_client.unanswered
        hold(Invariant.QUEUES, unanswered <= dispatcher.in_flight, "questions pile up", unanswered)
        attempts = sum(client.attempts for client in cluster.clients.values() if client.front is front)
        orders = _orders(front)
        hold(Invariant.QUEUES, orders <= 2 * attempts, "orders pile up", (orders, attempts))
        lived_s = cluster.world.now_s - front.began_s
        allowed = limits.retry_budget_burst + limits.retry_budget_ratio * front.requests
        allowed += limits.retry_budget_per_s * lived_s
        hold(Invariant.RETRIES, front.retries <= allowed, "retries storm", (front.retries, allowed))
        _check_books(cluster, front)
    for worker in cluster.workers.values():
        worker.body.role.leases.check()
        _check_work(cluster, worker)
    for client in cluster.clients.values():
        if client.run is not None:
            hold(Invariant.QUEUES, len(client.run.flow.event_log) <= EVENT_LOG_MAX, "an event log grows", client.asked)


def _check_work(cluster: SimCluster, worker: WorkerProcess) -> None:
    """No worker computes for a request that is over."""
    told_s = cluster.world.now_s - TOLD_S_MAX
    if not worker.alive or cluster.world.stuck_until_s > told_s:
        return
    for request_id in worker.body.admission._blocks_of:
        client = cluster.client_of(request_id)
        over = client.outcome != "" and client.over_s < told_s
        hold(Invariant.RETURNED, not over, f"{worker.name} works for a request that is over", client.asked)


def _orders(front: FrontProcess) -> int:
    """Work of this front proxy that workers have, or that is on its way."""
    return sum(len(link._slots) for link in front.dispatcher._links._links.values())


def _check_books(cluster: SimCluster, front: FrontProcess) -> None:
    """A scheduler that speaks with a front proxy knows what that runs, and where."""
    plans, told_s = front.plans, cluster.world.now_s - TOLD_S_MAX
    leader = cluster.leader
    if leader is None or cluster.world.stuck_until_s > told_s or plans.connected_s > told_s:
        return
    # While a front proxy is frozen the scheduler may drop a plan that no worker runs. The next full report says it
    # again.
    if front.frozen_until_s and front.frozen_until_s + front.limits.plans_told_interval_s > told_s:
        return
    books = [each for each in leader.shell.core.fronts.values() if each.front_proxy_id == front.name]
    if not books:
        return
    for plan_id, plan in plans.plan_client.running.items():
        if plans.answered_s.get(plan_id, cluster.world.now_s) <= told_s:
            known = next((each.plans[plan_id] for each in books if plan_id in each.plans), None)
            hold(Invariant.RETURNED, known is not None, "the scheduler does not know of a plan that runs", plan)
            assert known is not None
            same = (known.prefill, known.decode) == (plan.prefill, plan.decode)
            hold(Invariant.RETURNED, same, "it takes it for another", (plan, known))


def check_blame(client: Client, awaited: Awaited, waited_s: float) -> None:
    """Work is taken from a worker for silence that its front proxy was awake to hear, and for no other."""
    front, config, limits = client.front, client.front.config, client.front.limits
    bound_s = {
        Awaited.STEP: config.stream_stall_timeout_s,
        Awaited.PROMPT: config.prefill_stall_timeout_s,
        Awaited.PULL: limits.handoff_stall_timeout_s,
        Awaited.ORPHANED_PULL: limits.orphaned_pull_timeout_s,
    }[awaited]
    now_s = front.world.now_s
    slept_s = max(0.0, min(front.frozen_until_s, now_s) - max(front.frozen_from_s, now_s - waited_s))
    # Looks are an interval apart, and one that is late by less than that still counts.
    heard_s = waited_s - slept_s + 2 * limits.stall_check_interval_s
    told = (client.asked, awaited, waited_s)
    hold(Invariant.BLAME, heard_s >= bound_s, "a worker is blamed for its front proxy's sleep", told)


def check_given_up(scheduler: SchedulerProcess, worker_id: str) -> None:
    """A worker is given up for silence that the scheduler was awake to hear, and for no other."""
    now_s, heard_s = scheduler.world.now_s, scheduler.heard_s.get(worker_id, 0.0)
    slept_s = max(0.0, min(scheduler.frozen_until_s, now_s) - max(scheduler.frozen_from_s, heard_s))
    silent_s = now_s - heard_s - slept_s
    long = silent_s >= scheduler.shell.config.worker_lease_s / 2
    hold(Invariant.BLAME, long, "a worker is given up for the scheduler's sleep", (worker_id, silent_s, slept_s))


def check_the_end(cluster: SimCluster) -> None:
    """Every request ended once and rightly, and nothing is left of any."""
    hold(Invariant.ENDS_ONCE, not cluster.errors, "a task failed unheard", cluster.errors)
    for client in cluster.clients.values():
        if client.front.alive:
            check_client(client, cluster)
    for front in cluster.fronts:
        if front.alive:
            desk, dispatcher = front.plans.plan_client, front.dispatcher
            left = (desk.unanswered, desk.running, dispatcher.in_flight, dispatcher.handoffs_held, _orders(front))
            hold(Invariant.RETURNED, left == (0, {}, 0, 0, 0), f"something is left on {front.name}", left)
    for worker in cluster.workers.values():
        if worker.alive:
            body, engine = worker.body, worker.engine.load()
            held = (len(body.role.leases), engine.kv_blocks_used, len(body.background))
            hold(Invariant.RETURNED, not any(held), f"leases or blocks are left on {worker.name}", held)
            asked = (body.admission.requests, body.admission.blocks, engine.requests_running, engine.requests_waiting)
            hold(Invariant.RETURNED, not any(asked), f"requests are left on {worker.name}", asked)
    leaders = [scheduler for scheduler in cluster.schedulers.values() if scheduler.leads]
    hold(Invariant.ONE_LEADS, len(leaders) == 1, "not one leads", [scheduler.name for scheduler in leaders])
    core = leaders[0].shell.core
    hold(Invariant.RETURNED, not leaders[0].shell.broken.is_set(), "the core broke", core.event_log())
    missing = [name for name in cluster.workers if core.cluster.get(name) is None and name not in cluster.ended]
    hold(Invariant.UNNOTICED, not missing, "a worker that is well is not known", (missing, core.event_log()))
    core.check()
    cluster.accounts.check_the_end(cluster)
    silent = [front for front in cluster.fronts if front.alive and not front.plans.plan_client.connected]
    if silent:
        # A scheduler whose answer was lost, and that has nothing new to say, is told nothing until it is dialled again.
        waits = cluster.faults.plan_lost > 0 and all(
            each.limits.plans_told_interval_s > REDIAL_S_MAX for each in silent
        )
        hold(Invariant.RETURNED, waits, "a scheduler counts as silent", core.event_log())
        return
    if leaders[0].shell.accounting is not None:
        cluster.accounts.check_leader(cluster, leaders[0].shell.accounting)
    hold(Invariant.RETURNED, core.plans_in_flight == 0, "plans are left", core.event_log())
    for member in core.cluster.workers.values():
        left_there = f"blocks are reserved on {member.worker_id}"
        reserved = sum(rank.reserved_blocks for rank in member.ranks)
        hold(Invariant.RETURNED, reserved == 0, left_there, core.event_log())
        body = cluster.workers[member.worker_id].body
        roles = (member.role, member.info.registration, member.flipping), (body.role.name, body.registration, False)
        hold(Invariant.RETURNED, roles[0] == roles[1], f"{member.worker_id} has another role", core.event_log())


def check_client(client: Client, cluster: SimCluster) -> None:
    """A request ended once and rightly."""
    faults, asked, finish, failure = cluster.faults, client.asked, client.finish, client.failure
    hold(Invariant.ENDS_ONCE, client.outcome != "", "a request has no end", asked)
    if finish is not None:
        seen = (asked, finish, client.tokens, client.tokens_charged)
        # A client that left does not read what was already given to it.
        read_all = client.outcome != "cancelled" and not asked.satisfied
        given = finish.output_tokens - (0 if client.run is None else client.run.withheld_tokens)
        hold(Invariant.TOKENS, not read_all or given == client.tokens, "tokens are miscounted", seen)
        hold(Invariant.TOKENS, client.tokens_charged == finish.output_tokens, "its plans do not add up", seen)
        fits = (finish.outcome == "finished") == (finish.failure is None)
        hold(Invariant.ENDS_ONCE, fits, "an end contradicts itself", finish)
    if client.outcome == "finished" and asked.leaves_after_s is None:
        whole = client.told_the_end and (client.tokens == len(client.right) or client.cut_by_budget)
        hold(Invariant.TOKENS, whole, "an answer is not whole", (asked, client.tokens))
    refused = client.outcome == "refused" or client.cut_by_budget
    hold(Invariant.UNDISTURBED, not refused or cluster.accounts.refuses, "refused, and nothing bounds it", asked)
    if client.diverged:
        refused = client.outcome in ("failed", "cancelled") and faults.diverge > 0
        hold(Invariant.UNDISTURBED, refused, "a right replay was refused", (asked, finish))
    if faults.single:
        full = failure is not None and failure.kind is FailureKind.EXHAUSTED and client.tokens == 0
        unnoticed = client.outcome == "finished" or (faults.crowded and full)
        hold(Invariant.UNNOTICED, unnoticed, "a single failure was noticed", (asked, failure))
        in_time = faults.crowded or client.gap_s <= cluster.gap_s_max
        hold(Invariant.UNNOTICED, in_time, "a client waits too long", (asked, client.gap_s))
    if failure is not None and faults == Faults(schedulers=faults.schedulers, flips=faults.flips):
        # A request that waits for its rate may wait until its deadline.
        waited = failure.kind is FailureKind.DEADLINE and cluster.accounts.refuses
        full = waited or failure.kind is FailureKind.EXHAUSTED
        hold(Invariant.UNNOTICED, full, "a request failed and nothing was wrong", failure)
    if failure is not None and failure.kind is FailureKind.INTERNAL:
        expected = faults.engine_error > 0 or faults.diverge > 0
        hold(Invariant.UNDISTURBED, expected, "some code broke", failure)
