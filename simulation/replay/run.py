"""One replay: arrivals of a trace, a policy that places them, engines that compute them, links that carry their KV.

Open loop: requests come when the trace says, however the cluster is doing, and a refused one does not come back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import msgspec

from runtime.roles import WorkerRole
from runtime.user_error import UserError
from scheduler.config import SchedulerParameters
from simulation.kernel.world import World
from simulation.replay import report
from simulation.replay.baton_policy import Baton
from simulation.replay.cluster_model import ClusterModel
from simulation.replay.engine import NOISE_FACTOR_MIN, Engine
from simulation.replay.policy import (
    FirstToken,
    MakePolicy,
    PolicyEvent,
    Refuse,
    Request,
    RequestArrived,
    RequestEnded,
    Run,
    Tick,
    Wait,
    WorkerRegistered,
)
from simulation.replay.report import Gaps, Outcome, PoolUse, Report, Slo
from simulation.replay.reporting import Reporter
from simulation.replay.traces import Trace
from simulation.replay.work import Work

DRAIN_MAX_S = 600.0
"""After the last arrival so much time passes at most. What is not over then is unfinished."""
SLICE_S = 60.0
POLICIES: Mapping[str, MakePolicy] = {"baton": Baton}


class BadDecision(Exception):
    """A policy broke the interface."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is replayed. Time stamps are divided by ``load``."""

    trace: Trace
    model: ClusterModel
    prefill: int
    decode: int
    load: float = 1.0
    seed: int = 0
    slo: Slo = Slo()


class Spent(msgspec.Struct, kw_only=True):
    """Real time. It differs from run to run, so it is no part of a report."""

    wall_s: float = 0.0
    policy_s: float = 0.0
    decisions: int = 0

    @property
    def decisions_per_s(self) -> float:
        """Requests decided in a second of the policy's own time, with all that it is told meanwhile."""
        return self.decisions / self.policy_s if self.policy_s else 0.0


class Replay:
    """Run it once."""

    def __init__(self, scenario: Scenario, name: str, make: MakePolicy) -> None:
        trace, model, seed = scenario.trace, scenario.model, scenario.seed
        if trace.key_tokens % model.block_size_tokens:
            raise UserError(
                f"block keys of {trace.key_tokens} tokens are not made of the cluster model's blocks of "
                f"{model.block_size_tokens} tokens"
            )
        self.world = World(seed, events_max=1 << 60)
        self.spent = Spent()
        self._scenario, self._model, self._name = scenario, model, name
        self._config = SchedulerParameters()
        self._policy = make(random.Random(f"{seed} policy"))
        counts: dict[WorkerRole, int] = {"prefill": scenario.prefill, "decode": scenario.decode}
        self.engines = {
            f"{role}-{index}": Engine(f"{role}-{index}", role, model, trace.key_tokens, self.world, self)
            for role, count in counts.items()
            for index in range(count)
        }
        self._reporters = {engine: Reporter(engine, self.world, self._feed) for engine in self.engines.values()}
        self._arrivals = trace.spread(random.Random(f"{seed} arrivals"), scenario.load)
        self.outcomes = [Outcome(each.arrived_s, each.prompt_tokens, each.output_tokens) for each in self._arrivals]
        self._counted_from_s = self._arrivals[report.first_counted(len(self._arrivals))].arrived_s
        self._output_tokens_max = trace.output_tokens_max
        self._undecided: set[int] = set()
        self._decode_of: dict[int, Engine] = {}
        self._ended = 0
        self._gaps = Gaps()
        self._moved_tokens = self._spared_tokens = 0

    def run(self, progress: Callable[[float, int], None] | None = None) -> Report:
        """Replay the whole trace. ``progress`` is told the virtual time and how many requests are over."""
        began_s = time.perf_counter()
        for engine in self.engines.values():
            self._feed(WorkerRegistered(engine.info()))
        for reporter in self._reporters.values():
            reporter.begin()
        self._tick()
        self.world.at(self._arrivals[0].arrived_s + self._model.message_s, self._arrive, 0)
        give_up_s = self._arrivals[-1].arrived_s + DRAIN_MAX_S
        while self._ended < len(self._arrivals) and self.world.now_s < give_up_s:
            self.world.run(min(self.world.now_s + SLICE_S, give_up_s))
            if progress is not None:
                progress(self.world.now_s, self._ended)
        self.check()
        self.spent.wall_s = time.perf_counter() - began_s
        return self.report()

    def check(self) -> None:
        """Assert that nothing is lost, and that engines without work hold nothing."""
        for engine in self.engines.values():
            engine.check()
        if self._ended == len(self._arrivals):
            assert not self._undecided and not self._decode_of
            assert all(engine.empty for engine in self.engines.values())

    # What happens by itself

    def _arrive(self, index: int) -> None:
        arrival = self._arrivals[index]
        if index + 1 < len(self._arrivals):
            self.world.at(self._arrivals[index + 1].arrived_s + self._model.message_s, self._arrive, index + 1)
        slo = self._scenario.slo
        request = Request(
            request_id=index,
            arrived_s=arrival.arrived_s,
            prompt_tokens=arrival.prompt_tokens,
            block_keys=arrival.block_keys,
            key_tokens=self._scenario.trace.key_tokens,
            output_tokens_max=self._output_tokens_max,
            priority_class=arrival.priority_class,
            tenant=arrival.tenant,
            ttft_slo_s=slo.ttft_of(arrival.prompt_tokens, self._model),
            itl_slo_s=slo.itl_s,
        )
        self._undecided.add(index)
        self.spent.decisions += 1
        self._feed(RequestArrived(request))

    def _tick(self) -> None:
        self._feed(Tick())
        self.world.after(self._config.tick_interval_s, self._tick)

    # Decisions

    def _feed(self, event: PolicyEvent) -> None:
        began_s = time.perf_counter()
        decisions = self._policy.handle(event, self.world.now_s)
        self.spent.policy_s += time.perf_counter() - began_s
        for decision in decisions:
            if decision.request_id not in self._undecided:
                raise BadDecision(f"{self._name}: request {decision.request_id} is decided already, or has not come")
            if isinstance(decision, Wait):
                continue
            self._undecided.remove(decision.request_id)
            if isinstance(decision, Refuse):
                self._over(decision.request_id, decision.cause)
            else:
                self._place(decision)

    def _place(self, decision: Run) -> None:
        decode = self.engines.get(decision.decode)
        prefill = None if decision.prefill is None else self.engines.get(decision.prefill)
        roles = (None if decision.prefill is None else "prefill", "decode")
        if (prefill and prefill.role, decode and decode.role) != roles or decode is None:
            raise BadDecision(f"{self._name}: no such pair of workers: {decision}")
        # The plan goes to the front proxy, and the prompt from there to a worker.
        self.world.after(2 * self._model.message_s, self._start, decision.request_id, prefill, decode)

    def _start(self, request_id: int, prefill: Engine | None, decode: Engine) -> None:
        arrival = self._arrivals[request_id]
        most = arrival.prompt_tokens + arrival.output_tokens
        if most > self._model.kv_blocks_total * self._model.block_size_tokens:
            self._end(request_id, "failed")
            return
        self._decode_of[request_id] = decode
        whole = prefill is None or arrival.output_tokens == 1
        self.outcomes[request_id].whole = whole
        tokens = arrival.output_tokens if whole else 1
        work = Work(request_id, arrival.block_keys, arrival.prompt_tokens, tokens, lends=not whole)
        (prefill or decode).submit(work)

    def _end(self, request_id: int, how: str) -> None:
        """A request that ran is over, and the policy is told."""
        outcome = self.outcomes[request_id]
        outcome.ended_s = self.world.now_s
        finished = how == "finished"
        self._over(request_id, how)
        self._feed(RequestEnded(request_id, outcome.output_tokens if finished else 0, finished))

    def _over(self, request_id: int, how: str) -> None:
        self.outcomes[request_id].end = how
        self._decode_of.pop(request_id, None)
        self._ended += 1

    # What engines tell

    def gave_first(self, engine: Engine, work: Work) -> None:
        """The first token travels to the client; at the front proxy the decode worker is asked to go on."""
        self.world.after(self._model.message_s, self._first_token, engine, work)

    def _first_token(self, engine: Engine, work: Work) -> None:
        outcome = self.outcomes[work.request_id]
        outcome.first_s = self.world.now_s
        outcome.cached_tokens = work.cached_tokens
        self._feed(FirstToken(work.request_id, work.cached_tokens))
        if work.lends:
            arrival = self._arrivals[work.request_id]
            onward = Work(work.request_id, arrival.block_keys, arrival.prompt_tokens, arrival.output_tokens - 1)
            onward.source, onward.last_s = (engine, work), work.last_s
            self.world.after(self._model.message_s, self._decode_of[work.request_id].submit, onward)

    def gave_last(self, engine: Engine, work: Work) -> None:
        """The last token travels to the client."""
        self.world.after(self._model.message_s, self._end, work.request_id, "finished")

    def pull(self, engine: Engine, work: Work, tokens: int) -> None:
        """Move KV as soon as the links of both ends are free."""
        assert work.source is not None
        lender, lent = work.source
        self._moved_tokens += tokens
        self._spared_tokens += work.tokens - tokens
        noise = max(NOISE_FACTOR_MIN, self.world.rng.gauss(1.0, self._model.noise))
        begins_s = max(self.world.now_s + self._model.link.latency_s, lender.link_free_s, engine.link_free_s)
        lender.link_free_s = engine.link_free_s = ends_s = begins_s + noise * self._model.transfer_s(tokens)
        self.world.at(ends_s, self._pulled, engine, work, lender, lent, tokens)

    def _pulled(self, engine: Engine, work: Work, lender: Engine, lent: Work, tokens: int) -> None:
        # A worker that moved KV has something new to report, also where its load is as before.
        lender.tokens_out += tokens
        engine.tokens_in += tokens
        lender.let_go(lent)
        engine.pulled(work)

    def changed(self, engine: Engine) -> None:
        """Its worker reports it soon."""
        self._reporters[engine].changed()

    def gap(self, gap_s: float, tokens: int) -> None:
        """Count it if the cluster has filled up."""
        if tokens and self.world.now_s >= self._counted_from_s:
            self._gaps.add(gap_s, tokens)

    # The report

    def report(self) -> Report:
        """Of what is over by now."""
        scenario = self._scenario
        span_s = max(max(each.ended_s for each in self.outcomes) - self._arrivals[0].arrived_s, 1e-9)
        return msgspec.convert(
            {
                "policy": self._name,
                "load": scenario.load,
                "seed": scenario.seed,
                "moved_tokens": self._moved_tokens,
                "spared_tokens": self._spared_tokens,
                "prefill": self._use("prefill", span_s),
                "decode": self._use("decode", span_s),
                **report.summary(self.outcomes, self._gaps, scenario.slo, self._model),
            },
            Report,
        )

    def _use(self, role: WorkerRole, span_s: float) -> PoolUse:
        engines = [engine for engine in self.engines.values() if engine.role == role]
        tokens = [engine.prefill_tokens + engine.decode_tokens for engine in engines]
        return PoolUse(
            workers=len(engines),
            utilisation=sum(engine.busy_s for engine in engines) / (span_s * len(engines)) if engines else 0.0,
            imbalance=max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else 0.0,
            preemptions=sum(engine.preemptions for engine in engines),
        )
