"""A simulated worker: an engine with continuous batching, chunked prefill, preemption and paged KV, in virtual time.

As in vLLM, a step gives each decoding sequence a token and spends the rest of its token budget on chunks of prompts, in
the order of their coming. When a sequence finds no block for its next token, the last one gives way and is computed
again later. While no prompt is computed, steps differ only by the growing contexts, so that they are advanced together,
in closed form, until a sequence ends, comes, or finds no block.

Simpler than vLLM: a prompt gets all of its blocks when it begins, and its blocks are shared once all are computed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from runtime.roles import WorkerRole
from scheduler.api.worker_info import WorkerInfo, WorkerLoad, WorkerState
from scheduler.api.worker_progress import EngineStep
from simulation.kernel.world import World
from simulation.replay.cluster_model import ClusterModel
from simulation.replay.kv_pool import KvPool
from simulation.replay.work import Listener, Work

STEPS_REPORTED_MAX = 8
NOISE_FACTOR_MIN = 0.5
_READY = WorkerState.READY


class Engine:
    """Takes work, and tells its listener what becomes of it."""

    def __init__(
        self, worker_id: str, role: WorkerRole, model: ClusterModel, key_tokens: int, world: World, listener: Listener
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self.pool = KvPool(model.kv_blocks_total, key_tokens // model.block_size_tokens)
        self.link_free_s = 0.0
        # Tokens whose KV was pulled from here, and to here.
        self.tokens_out = self.tokens_in = 0
        self.busy_s = 0.0
        self.prefill_tokens = self.decode_tokens = self.preemptions = 0
        self.leases = 0
        self.steps: deque[EngineStep] = deque(maxlen=STEPS_REPORTED_MAX)
        self._model, self._times, self._key_tokens = model, model.step, key_tokens
        self._block = model.block_size_tokens
        self._world, self._listener = world, listener
        self._queued_tokens = 0
        self._waiting: deque[Work] = deque()
        self._pulling = 0
        self._prefilling: list[Work] = []
        # In the order of their joining; values are of no meaning.
        self._decoding: dict[Work, None] = {}
        self._joining: list[Work] = []
        # Joined since the last step: their gap before is not that of a step.
        self._fresh: list[Work] = []
        self._ends: list[tuple[int, int, Work]] = []
        # How many sequences need a block at step n, by n modulo the block size.
        self._phases = [0] * self._block
        self._at_step = 0
        self._context = 0
        # The steps in progress: when they began, how many, the first one's time, what each next adds, and chunks.
        self._began_s = self._first_s = self._more_s = 0.0
        self._planned = 0
        self._chunks: list[tuple[Work, int]] = []
        # Blocks that the first one took.
        self._grown = 0
        self._turn = 0
        self.turnover = 0
        """Requests that came or ended."""

    def info(self) -> WorkerInfo:
        """What it registers with."""
        model = self._model
        return WorkerInfo(
            worker_id=self.worker_id,
            role=self.role,
            address=f"{self.worker_id}:1",
            epoch=1,
            model=model.name,
            layout_fingerprint=model.name,
            block_size_tokens=model.block_size_tokens,
            kv_blocks_total=model.kv_blocks_total,
            engine_version="replay",
            block_bytes=model.block_size_tokens * model.kv_bytes_per_token,
            requests_max=model.requests_max,
        )

    def report(self) -> tuple[WorkerLoad, int]:
        """What it does now, and how many of the steps in progress are over, where there are several."""
        grown = done = 0
        if self._planned > 1 and (done := self._steps_done(self._world.now_s)):
            grown = self._growth(done + 1 if done < self._planned else done) - self._grown
        load = WorkerLoad(
            state=_READY,
            requests_running=len(self._decoding) + len(self._prefilling) + len(self._joining),
            requests_waiting=len(self._waiting) + self._pulling,
            kv_blocks_used=self.pool.used + grown,
            leases_held=self.leases,
            kv_bytes_in=self.tokens_in * self._model.kv_bytes_per_token,
            kv_bytes_out=self.tokens_out * self._model.kv_bytes_per_token,
            prefill_tokens_queued=self._queued_tokens,
        )
        return load, done

    @property
    def empty(self) -> bool:
        """Whether it has no work and lends nothing."""
        return not (
            self._decoding or self._prefilling or self._joining or self._waiting or self._pulling or self.leases
        )

    # Coming and going

    def submit(self, work: Work) -> None:
        """A request comes. The caller has seen that this worker could hold it alone."""
        self.turnover += 1
        self._queued_tokens += work.tokens
        self._waiting.append(work)
        self._stir()

    def pulled(self, work: Work) -> None:
        """The KV of this work has come."""
        assert work.source is not None
        self._pulling -= 1
        work.source = None
        work.computed = work.tokens
        self._share(work)
        self._joining.append(work)
        self._stir()

    def let_go(self, work: Work) -> None:
        """The blocks that it lends are not needed any more."""
        self.leases -= 1
        self.pool.release(work.keys[: work.keyed], self._own_blocks(work))
        self._stir()

    def _stir(self) -> None:
        """Something changed: it is looked at after the step in progress."""
        self._listener.changed(self)
        now_s = self._world.now_s
        if not self._planned:
            self._begin(now_s)
            return
        if self._planned == 1:
            return
        done = self._steps_done(now_s)
        # A step that ends right now is over.
        until = done if done and self._span_s(done) + self._began_s >= now_s else done + 1
        if until < self._planned:
            self._plan(until)

    # Steps

    def _begin(self, now_s: float) -> None:
        """Say what the next step computes, or rest."""
        for work in self._joining:
            self._join(work)
        self._joining.clear()
        starved = False
        while (needed := self._phases[self._at_step % self._block]) > self.pool.free:
            self._preempt()
            starved = True
        self.pool.grow(needed)
        self._grown = needed
        self._began_s = now_s
        chunks = self._chunks = self._next_chunks(admits=not starved) if self._prefilling or self._waiting else []
        requests = len(self._decoding)
        if not requests and not chunks:
            self._planned = 0
            return
        factor = max(NOISE_FACTOR_MIN, self._world.rng.gauss(1.0, self._model.noise))
        times = self._model.prompts if chunks else self._times
        step_s = times.fixed_s + times.decode_s(requests, self._context)
        if chunks:
            pairs = sum(chunk * (work.computed + chunk / 2) for work, chunk in chunks)
            step_s += times.prefill_s(sum(chunk for _, chunk in chunks), pairs)
        self._first_s = factor * step_s
        self._more_s = factor * times.decode_context_token_s * requests
        if chunks or starved:
            # What gave way may begin again after this step.
            self._plan(1)
            return
        while self._ends[0][2].ends_at != self._ends[0][0] or self._ends[0][2] not in self._decoding:
            heapq.heappop(self._ends)
        self._plan(self._steps_with_room(self._ends[0][0] - self._at_step))

    def _plan(self, steps: int) -> None:
        """Let the steps in progress be so many."""
        self._planned = steps
        self._turn += 1
        self._world.at(self._began_s + self._span_s(steps), self._end_steps, self._turn)

    def _end_steps(self, turn: int) -> None:
        if turn != self._turn:
            return  # Fewer were planned meanwhile.
        now_s, chunks = self._world.now_s, self._chunks
        self.busy_s += now_s - self._began_s
        if chunks:
            self.steps.append(
                EngineStep(
                    self._first_s,
                    sum(chunk for _, chunk in chunks),
                    sum(chunk * (2 * work.computed + chunk) // 2 for work, chunk in chunks),
                    len(self._decoding),
                    self._context,
                )
            )
        else:
            self.steps.append(self.decode_step(self._planned))
        if self._decoding:
            self._advance(self._planned, now_s)
        for work, chunk in chunks:
            self.prefill_tokens += chunk
            work.computed += chunk
            if work.computed == work.tokens:
                self._prefilling.remove(work)
                self._share(work)
                self._computed(work, now_s)
        self._listener.changed(self)
        self._begin(now_s)

    def _computed(self, work: Work, now_s: float) -> None:
        """A prompt is computed, and with it one more token."""
        first = work.last_s == 0.0
        if not first:
            self._listener.gap(now_s - work.last_s, 1)
        if not work.given:
            self._queued_tokens -= work.tokens
        work.given += 1
        work.left -= 1
        work.last_s = now_s
        last = work.left == 0
        if work.lends:
            self.leases += 1
        elif last:
            self.pool.release(work.keys[: work.keyed], self._own_blocks(work))
        else:
            self._join(work)
        if first:
            self._listener.gave_first(self, work)
        if last and not work.lends:
            self.turnover += 1
            self._listener.gave_last(self, work)

    def _advance(self, steps: int, now_s: float) -> None:
        """Every decoding sequence got a token in each of the steps."""
        requests, fresh = len(self._decoding), self._fresh
        self.pool.grow(self._growth(steps) - self._grown)
        span_s, gap = now_s - self._began_s, self._listener.gap
        for work in fresh:
            # Its client waited for the pull, or since it gave way, and not only for the first step.
            gap(self._began_s + self._first_s - work.last_s, 1)
            if not work.given:
                self._queued_tokens -= work.tokens
        if steps > 1:
            gap((span_s - self._first_s) / (steps - 1), len(fresh) * (steps - 1))
        gap(span_s / steps, (requests - len(fresh)) * steps)
        fresh.clear()
        self._at_step += steps
        self._context += requests * steps
        self.decode_tokens += requests * steps
        while self._ends and self._ends[0][0] <= self._at_step:
            ends_at, _, work = heapq.heappop(self._ends)
            if work in self._decoding and work.ends_at == ends_at:
                self._leave(work, now_s)
                self.turnover += 1
                self.pool.release(work.keys[: work.keyed], self._own_blocks(work))
                self._listener.gave_last(self, work)

    # Sequences

    def _next_chunks(self, *, admits: bool) -> list[tuple[Work, int]]:
        """Chunks of prompts for the next step, as the token budget allows. Starts pulls on the way."""
        budget = self._model.batched_tokens_max - len(self._decoding)
        chunks: list[tuple[Work, int]] = []
        for work in self._prefilling:
            if budget <= 0:
                return chunks
            chunk = min(budget, work.tokens - work.computed)
            chunks.append((work, chunk))
            budget -= chunk
        waiting = self._waiting
        while admits and waiting and budget > 0 and self._sequences() < self._model.sequences_max:
            work = waiting[0]
            # An engine computes at least the last token of a prompt.
            keys = work.keys if work.source is not None else work.keys[: (work.tokens - 1) // self._key_tokens]
            shared = self.pool.admit(keys, -(-work.tokens // self._block))
            if shared is None:
                break
            waiting.popleft()
            work.keyed = shared
            work.computed = shared * self._key_tokens
            if work.source is not None:
                self._pulling += 1
                self._listener.pull(self, work, work.tokens - work.computed)
                continue
            if not work.given:
                work.cached_tokens = work.computed
            self._prefilling.append(work)
            chunk = min(budget, work.tokens - work.computed)
            chunks.append((work, chunk))
            budget -= chunk
        return chunks

    def _sequences(self) -> int:
        return len(self._decoding) + len(self._prefilling) + self._pulling

    def _share(self, work: Work) -> None:
        """All blocks of its prompt are there: others may use them."""
        self.pool.publish(work.keys[work.keyed :])
        work.keyed = len(work.keys)

    def _join(self, work: Work) -> None:
        work.joined_at = self._at_step
        work.ends_at = self._at_step + work.left
        self._decoding[work] = None
        self._fresh.append(work)
        heapq.heappush(self._ends, (work.ends_at, self._world.number(), work))
        self._phases[(work.joined_at - work.tokens) % self._block] += 1
        self._context += work.tokens

    def _leave(self, work: Work, now_s: float) -> None:
        """It decodes no longer, or not now. Its tokens are those that it has KV for."""
        del self._decoding[work]
        self._phases[(work.joined_at - work.tokens) % self._block] -= 1
        steps = self._at_step - work.joined_at
        if steps:
            work.last_s = now_s
        self._context -= work.tokens + steps
        work.given += steps
        work.left -= steps
        work.tokens += steps

    def _preempt(self) -> None:
        """The sequence that came last gives way; it will be the first to be computed again."""
        self.preemptions += 1
        if self._prefilling:
            work = self._prefilling.pop()
        else:
            work = next(reversed(self._decoding))
            if work in self._fresh:
                self._fresh.remove(work)
            self._leave(work, self._world.now_s)
        self.pool.release(work.keys[: work.keyed], self._own_blocks(work))
        work.computed = work.keyed = 0
        self._waiting.appendleft(work)

    def _own_blocks(self, work: Work) -> int:
        return -(-work.tokens // self._block) - work.keyed * self.pool.key_blocks

    # Closed forms

    def _span_s(self, steps: int) -> float:
        """How long the first ``steps`` of the steps in progress take."""
        return steps * self._first_s + self._more_s / 2 * steps * (steps - 1)

    def _steps_done(self, now_s: float) -> int:
        """How many of them are over."""
        elapsed_s, first_s, half_s = now_s - self._began_s, self._first_s, self._more_s / 2
        if half_s > 0.0:
            linear_s = first_s - half_s
            done = int((math.sqrt(linear_s * linear_s + 4 * half_s * elapsed_s) - linear_s) / (2 * half_s))
        else:
            done = int(elapsed_s / first_s)
        # The root is not exact.
        if done and done * first_s + half_s * done * (done - 1) > elapsed_s:
            done -= 1
        elif (done + 1) * first_s + half_s * (done + 1) * done <= elapsed_s:
            done += 1
        return min(self._planned, done)

    def _growth(self, steps: int) -> int:
        """Blocks that the decoding sequences need for so many steps from the present one."""
        block, phases = self._block, self._phases
        whole, part = divmod(steps, block)
        start = self._at_step % block
        end = start + part
        needed = sum(phases[start:end])
        if end > block:
            needed += sum(phases[: end - block])
        return whole * len(self._decoding) + needed

    def _steps_with_room(self, steps: int) -> int:
        """Of so many steps, those for which there are blocks. The first one has its blocks already."""
        room = self.pool.free + self._grown
        if len(self._decoding) * (steps // self._block + 1) <= room or self._growth(steps) <= room:
            return steps
        enough, too_many = 1, steps
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if self._growth(middle) <= room:
                enough = middle
            else:
                too_many = middle
        return enough

    def decode_step(self, number: int) -> EngineStep:
        """One of the decode steps in progress, from 1 on."""
        requests, earlier = len(self._decoding), number - 1
        last_s = self._first_s + self._more_s * earlier
        return EngineStep(last_s, 0, 0, requests, self._context + requests * earlier)

    def check(self) -> None:
        """Assert that nothing is left of work that ended, and no block is lost."""
        self.pool.check()
        assert self._queued_tokens >= 0
        if self.empty:
            assert self._queued_tokens == self._context == self.pool.used == sum(self._phases) == 0, self.worker_id
