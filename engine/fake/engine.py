"""A deterministic engine without a model, for tests and simulation. Never what a user starts by default.

Its next token is a pure function of all tokens before it, so a prefill here continued there must give the same text
as one engine alone. Time passes only through the running loop's clock, so it runs in a virtual loop. Steps are batched
as in a real engine: one step admits, sleeps for what the cost model says, and gives every running sequence one token.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict, deque

import msgspec

from engine.config import EngineConfig
from engine.epoch import next_epoch
from engine.fake.fabric import FakeKvFabric, digest_of, process_fabric
from engine.fake.model import FakeSampling, first_tokens_logprobs, prompt_scores, refuse, sequence_state
from engine.fake.sequence import Sequence
from engine.protocol import (
    MEASURED_STEPS_MAX,
    BlockListener,
    EngineDead,
    EngineError,
    EngineInfo,
    EngineLoad,
    EngineOutput,
    EngineRequest,
    Finish,
    FirstOutput,
    Hold,
    InvalidRequest,
    MeasuredStep,
    OnOutput,
    TakeOver,
)
from engine.ranks import Ranks
from engine.work_meter import WorkMeter
from kv_transfer.handoff import layout
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.prefix.events import BlocksRemoved, BlocksStored, EngineEvent
from runtime.timing.clock import precise_clock

_CONTEXT_TOKENS_MAX = 4096


class FakeEngine:
    """One fake engine: sequences, blocks, leases. All of it on one event loop."""

    def __init__(self, config: EngineConfig, *, worker_id: str, epoch: int, fabric: FakeKvFabric | None = None) -> None:
        self._config = config
        self._fake = config.fake
        self._worker_id = worker_id
        self._fabric = process_fabric if fabric is None else fabric
        self._info = info = _info(config, worker_id, epoch)
        # It only counts by rank: steps, blocks and prefixes are those of one engine.
        self.ranks = Ranks(
            info.ranks, block_size_tokens=info.block_size_tokens, blocks_max=info.kv_blocks_total // info.ranks
        ) if info.ranks > 1 else None  # fmt: skip
        self._waiting: deque[Sequence] = deque()
        self._pulling: set[Sequence] = set()
        self._running: list[Sequence] = []
        self._leases: dict[str, tuple[int, asyncio.TimerHandle]] = {}
        self._cached_prefixes: OrderedDict[bytes, None] = OrderedDict()
        self._block_listener: BlockListener | None = None
        self._block_batches = 0
        self._blocks_used = 0
        self._bytes_in = 0
        self._pull_s = 0.0
        self._bytes_out = 0
        self._pulls = 0
        self._requests = 0
        self._dead = False
        self._steps = 0
        self.meter = WorkMeter()
        self._measured: deque[MeasuredStep] = deque(maxlen=MEASURED_STEPS_MAX)
        # What a hung engine waits for.
        self._never = asyncio.Event()
        self._stepper: asyncio.Task[None] | None = None
        self._fabric.join(self._info.engine_id, self._pulled_from_here)

    @classmethod
    async def start(cls, config: EngineConfig, *, worker_id: str) -> FakeEngine:
        """An engine with an epoch of its own, after the configured start-up time."""
        await asyncio.sleep(config.fake.start_s)
        return cls(config, worker_id=worker_id, epoch=next_epoch())

    @property
    def info(self) -> EngineInfo:
        """Fixed for the life of this object."""
        return self._info

    async def generate(self, request: EngineRequest, on_output: OnOutput) -> None:
        """Run one sequence to its end; see ``Engine``. Raises EngineError."""
        sequence = self._accept(request, on_output)
        if self.ranks is not None:
            came = isinstance(request.transfer, TakeOver)
            self.ranks.choose(request.request_id, request.token_ids, comes_with_kv=came, named=request.rank)
            sequence.on_output = self.ranks.hearing(request.request_id, on_output)
        try:
            await sequence.ended
        finally:
            if self.ranks is not None:
                self.ranks.ended(request.request_id)
            self._leave(sequence)
            if not sequence.handed_over and isinstance(request.transfer, Hold):
                self._free_lease(request.request_id)

    async def release(self, handoff_lease_id: str) -> None:
        """Free the KV a ``Hold`` kept. Idempotent; safe while or after it is pulled."""
        self._free_lease(handoff_lease_id)

    async def renew(self, handoff_lease_id: str, lease_s: float) -> None:
        """Keep the KV of a ``Hold`` for ``lease_s`` from now, if it is still held; never shorter than before."""
        held = self._leases.get(handoff_lease_id)
        loop = asyncio.get_running_loop()
        if held is None or held[1].when() >= loop.time() + lease_s:
            return
        held[1].cancel()
        timer = loop.call_later(lease_s, self._free_lease, handoff_lease_id)
        self._leases[handoff_lease_id] = (held[0], timer)

    def pulled(self, handoff_lease_id: str) -> None:
        """Free KV that an engine in another process took over: no transfer layer connects fake engines."""
        held = self._leases.get(handoff_lease_id)
        if held is not None:
            self._bytes_out += held[0] * self._info.block_bytes
            self._free_lease(handoff_lease_id)

    def load(self) -> EngineLoad:
        """The load now."""
        return EngineLoad(
            requests_running=len(self._running),
            requests_waiting=len(self._waiting) + len(self._pulling),
            kv_blocks_used=self._blocks_used,
            kv_bytes_in=self._bytes_in,
            kv_bytes_out=self._bytes_out,
            kv_pull_s=self._pull_s,
            transports=("fake",) if self._bytes_in else (),
            steps=self._steps,
            ranks=() if self.ranks is None else self.ranks.loads(*[[0] * self._info.ranks] * 2),
        )

    def take_steps(self) -> list[MeasuredStep]:
        """The last steps since this was called, oldest first; without waiting."""
        steps = list(self._measured)
        self._measured.clear()
        return steps

    def report_blocks(self, listener: BlockListener, rank: int = 0) -> bool:
        """Tell it of blocks that are remembered and forgotten from now on; not by rank."""
        self._block_listener = listener if self.ranks is None else None
        return self.ranks is None

    async def join_experts(self, role: str, scheduler_address: str) -> None:
        """It has no experts."""

    async def check_health(self) -> None:
        """Raise EngineDead when the engine can do no more work."""
        if self._dead:
            raise EngineDead("the fake engine died")

    async def ping(self) -> None:
        """Return at once, unless it hangs."""
        await self.check_health()
        if self._hangs:
            await self._never.wait()

    async def close(self) -> None:
        """End every sequence and lease."""
        self.die()
        stepper, self._stepper = self._stepper, None
        if stepper is not None:
            stepper.cancel()
            await asyncio.wait([stepper])

    def die(self) -> None:
        """Behave as a killed engine process does; also a fault that tests inject."""
        if self._dead:
            return
        self._dead = True
        self._fabric.leave(self._info.engine_id)
        for sequence in (*self._waiting, *self._pulling, *self._running):
            sequence.fail(EngineDead("the fake engine died"))
        for _, timer in self._leases.values():
            timer.cancel()
        self._waiting.clear()
        self._pulling.clear()
        self._running.clear()
        self._leases.clear()
        self._blocks_used = 0

    # --- arrival and departure

    def _accept(self, request: EngineRequest, on_output: OnOutput) -> Sequence:
        if self._dead:
            raise EngineDead("the fake engine died")
        try:
            sampling = msgspec.msgpack.decode(request.sampling, type=FakeSampling)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"sampling parameters cannot be read: {error}") from error
        why = refuse(request.token_ids, sampling, self._fake.vocab_size, self._info.context_tokens_max)
        if why:
            raise InvalidRequest(why)
        if self._blocks_for(len(request.token_ids) + 1) > self._info.kv_blocks_total:
            raise InvalidRequest("the prompt needs more KV blocks than the engine has")
        self._requests += 1
        if self._fake.dies_after_requests and self._requests > self._fake.dies_after_requests:
            self.die()
            raise EngineDead("the fake engine died")
        loop = asyncio.get_running_loop()
        sequence = Sequence(
            request, sampling, sequence_state(request.token_ids, sampling, self._config.seed), loop.time(), on_output
        )
        self._queue(sequence)
        if self._stepper is None or self._stepper.done():
            self._stepper = loop.create_task(self._step_while_busy())
        return sequence

    def _queue(self, sequence: Sequence) -> None:
        """Behind all that wait and are as urgent."""
        at = len(self._waiting)
        while at and self._waiting[at - 1].request.priority > sequence.request.priority:
            at -= 1
        self._waiting.insert(at, sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Drop an unfinished sequence. While its KV is being pulled it keeps its blocks until the pull has ended."""
        sequence.left = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._running.remove(sequence)
            self._give_back(sequence)

    # --- steps

    @property
    def _hangs(self) -> bool:
        return 0 < self._fake.hangs_after_requests < self._requests

    async def _step_while_busy(self) -> None:
        now_s = precise_clock(asyncio.get_running_loop())
        began_s = now_s()
        while (self._waiting or self._running) and not self._dead:
            if self._hangs:
                await self._never.wait()
            compute_us = self._admit() + self._fake.step_us
            if not self._running:
                return  # a finished pull, a freed block or an arrival starts the next stepper
            if any(sequence.emitted for sequence in self._running):
                compute_us += self._fake.decode_step_us
            compute_us += self._fake.decode_step_us_per_request * len(self._running)
            make_up = self._make_up()
            await asyncio.sleep(compute_us / 1e6)
            # As of a real engine: from the end of the step before, with what lies between.
            ended_s = now_s()
            step = MeasuredStep(round((ended_s - began_s) * 1e6), *make_up)
            self._measured.append(step)
            self.meter.step(step.duration_us, step.prefill_tokens, step.decode_requests)
            began_s = ended_s
            self._steps += 1
            for sequence in list(self._running):
                if sequence in self._running:
                    self._advance(sequence)

    def _make_up(self) -> tuple[int, int, int, int]:
        """What this step computes: prompt tokens, their pairs, decoding sequences, their tokens."""
        tokens = pairs = decoding = context = 0
        for sequence in self._running:
            count, sequence.computing = sequence.computing, 1
            before = len(sequence.tokens) - count
            if count == 1:
                decoding += 1
                context += before
            else:
                tokens += count
                pairs += count * (2 * before + count) // 2
        return tokens, pairs, decoding, context

    def _admit(self) -> float:
        """Admit waiting sequences in order while seats and blocks last. Returns their prefill time in us."""
        compute_us = 0.0
        while self._waiting and len(self._running) + len(self._pulling) < self._config.max_num_seqs:
            sequence = self._waiting[0]
            blocks = self._blocks_for(len(sequence.tokens) + 1)
            if self._blocks_used + blocks > self._info.kv_blocks_total:
                break
            self._waiting.popleft()
            self._blocks_used += blocks
            sequence.blocks = blocks
            if isinstance(sequence.request.transfer, TakeOver) and not sequence.pull_done:
                self._pull(sequence, sequence.request.transfer.handoff)
                continue
            sequence.scheduled_s = asyncio.get_running_loop().time()
            if not sequence.external:
                sequence.cached = self._cached_tokens(sequence)
            sequence.computing = max(1, len(sequence.tokens) - sequence.cached - sequence.external)
            compute_us += sequence.computing * self._fake.prefill_us_per_token
            self._running.append(sequence)
        return compute_us

    def _pull(self, sequence: Sequence, handoff: KvHandoff) -> None:
        self._pulling.add(sequence)
        delay_s = handoff.blocks * self._fake.pull_us_per_block / 1e6
        asyncio.get_running_loop().call_later(delay_s, self._pull_ended, sequence, handoff)

    def _pull_ended(self, sequence: Sequence, handoff: KvHandoff) -> None:
        if sequence not in self._pulling:
            return  # the engine died
        self._pulling.discard(sequence)
        self._give_back(sequence)
        sequence.pull_done = True
        self._pulls += 1
        broken = self._fake.pull_failure_every and self._pulls % self._fake.pull_failure_every == 0
        if not broken and handoff.connector_params and self._fabric.pull(handoff):
            covered = min(handoff.tokens, len(sequence.request.token_ids))
            if not handoff_matches(handoff, sequence.request.token_ids):
                # A real engine would go on with wrong KV; a test must hear of it.
                sequence.error = EngineError("the hand-off is not of this prompt")
            sequence.external = min(covered, len(sequence.request.token_ids) - 1)
            self._bytes_in += handoff.blocks * self._info.block_bytes
            self._pull_s += handoff.blocks * self._fake.pull_us_per_block / 1e6
        if sequence.left:
            return
        if sequence.error is not None:
            sequence.deliver(EngineOutput(token_ids=[], finish=Finish("error")))
            return
        self._waiting.appendleft(sequence)
        self._wake()

    def _advance(self, sequence: Sequence) -> None:
        """One token for one sequence."""
        token = sequence.state.next_token(self._fake.vocab_size)
        now_s = asyncio.get_running_loop().time()
        first = None
        prompt_logprobs = None
        if not sequence.emitted:
            first = FirstOutput(
                cached_tokens=sequence.cached,
                external_tokens=sequence.external,
                queue_s=sequence.scheduled_s - sequence.arrived_s,
                compute_s=now_s - sequence.scheduled_s,
            )
            prompt_logprobs = prompt_scores(sequence.request.token_ids, sequence.sampling, self._fake.vocab_size)
            self._remember_prefix(sequence)
        sequence.append(token)
        finish = sequence.finish(token, self._fake.eos_token_id, self._info.context_tokens_max)
        handoff = None
        if finish is None:
            self._grow(sequence)
        else:
            self._running.remove(sequence)
            handoff = self._hold(sequence, finish)
        sequence.deliver(
            EngineOutput(
                token_ids=[token],
                finish=finish,
                first=first,
                logprobs=first_tokens_logprobs([token], sequence.sampling, self._fake.vocab_size),
                prompt_logprobs=prompt_logprobs,
                handoff=handoff,
            )
        )

    def _grow(self, sequence: Sequence) -> None:
        """Take a block for the next token. A full cache preempts: the latest of the least urgent starts over."""
        wanted = self._blocks_for(len(sequence.tokens) + 1)
        if wanted <= sequence.blocks:
            return
        if self._blocks_used < self._info.kv_blocks_total:
            self._blocks_used += 1
            sequence.blocks += 1
            return
        victim = max(reversed(self._running), key=lambda one: one.request.priority)
        self._running.remove(victim)
        self._give_back(victim)
        victim.external = 0
        self._waiting.appendleft(victim)
        if victim is not sequence:
            self._grow(sequence)

    # --- blocks, prefixes, leases

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._info.block_size_tokens)

    def _give_back(self, sequence: Sequence) -> None:
        self._blocks_used -= sequence.blocks
        sequence.blocks = 0
        assert self._blocks_used >= 0
        self._wake()

    def _wake(self) -> None:
        if self._waiting and not self._dead and (self._stepper is None or self._stepper.done()):
            self._stepper = asyncio.get_running_loop().create_task(self._step_while_busy())

    def _hold(self, sequence: Sequence, finish: Finish) -> KvHandoff | None:
        request = sequence.request
        if not isinstance(request.transfer, Hold) or finish.reason != "length":
            self._give_back(sequence)
            return None
        tokens = len(request.token_ids)
        blocks = self._blocks_for(tokens)
        self._blocks_used += blocks - sequence.blocks
        sequence.blocks = 0
        timer = asyncio.get_running_loop().call_later(request.transfer.lease_s, self._free_lease, request.request_id)
        self._leases[request.request_id] = (blocks, timer)
        return KvHandoff(
            worker_id=self._worker_id,
            epoch=self._info.epoch,
            lease_id=request.request_id,
            engine_id=self._info.engine_id,
            tokens=tokens,
            blocks=blocks,
            bytes=blocks * self._info.block_bytes,
            layout_fingerprint=self._info.layout_fingerprint,
            lease_remaining_s=request.transfer.lease_s,
            connector_params=digest_of(request.token_ids),
        )

    def _free_lease(self, lease_id: str) -> bool:
        held = self._leases.pop(lease_id, None)
        if held is None:
            return False
        blocks, timer = held
        timer.cancel()
        self._blocks_used -= blocks
        assert self._blocks_used >= 0
        self._wake()
        return True

    def _pulled_from_here(self, handoff: KvHandoff) -> bool:
        """Another engine read a lease; as with NIXL, that frees it. False when it is not held any more."""
        if not self._free_lease(handoff.lease_id):
            return False
        self._bytes_out += handoff.blocks * self._info.block_bytes
        return True

    def _cached_tokens(self, sequence: Sequence) -> int:
        """Whole blocks of the prompt that an earlier one left here; at least the last token is always computed."""
        size = self._info.block_size_tokens
        count = 0
        for key in sequence.block_keys(size)[: (len(sequence.tokens) - 1) // size]:
            if key not in self._cached_prefixes:
                break
            self._cached_prefixes.move_to_end(key)
            count += size
        return count

    def _remember_prefix(self, sequence: Sequence) -> None:
        size, cached = self._info.block_size_tokens, self._cached_prefixes
        events: list[EngineEvent] = []
        before = None
        for start, key in zip(itertools.count(0, size), sequence.block_keys(size), strict=False):
            if key not in cached:
                cached[key] = None
                events.append(
                    BlocksStored(
                        hashes=[key],
                        parent=before,
                        token_ids=sequence.tokens[start : start + size],
                        block_size_tokens=size,
                        salt=sequence.request.cache_salt or "",
                    )
                )
            before = key
        while len(cached) > self._info.kv_blocks_total:
            events.append(BlocksRemoved(hashes=[cached.popitem(last=False)[0]]))
        if events and self._block_listener is not None:
            self._block_listener.batch(self._block_batches, events)
            self._block_batches += 1


def handoff_matches(handoff: KvHandoff, token_ids: list[int]) -> bool:
    """Whether a fake hand-off is of the beginning of this prompt."""
    return handoff.connector_params == digest_of(token_ids[: handoff.tokens])


def _info(config: EngineConfig, worker_id: str, epoch: int) -> EngineInfo:
    model = config.served_model_name or config.model or "fake"
    parts = {"model": model, "block_size": str(config.block_size_tokens), "block_bytes": str(config.fake.block_bytes)}
    return EngineInfo(
        epoch=epoch,
        engine_id=f"{worker_id}-{epoch}",
        model=model,
        engine_version="fake-1",
        layout_fingerprint=layout.fingerprint(parts),
        block_size_tokens=config.block_size_tokens,
        block_bytes=config.fake.block_bytes,
        kv_blocks_total=config.fake.kv_blocks_total,
        ranks=config.data_parallel_size,
        context_tokens_max=config.max_model_len or _CONTEXT_TOKENS_MAX,
    )
