"""The interface of an inference engine. Holds types only; no vLLM type appears here.

The engine knows token ids, never text: tokenising and detokenising happen in the front proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from engine.work_meter import WorkMeter
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.prefix.events import EngineEvent
from kv_transfer.tiers.status import TierStatus

FinishReason = Literal["stop", "length", "abort", "error"]


class Hold(msgspec.Struct, frozen=True):
    """Keep the prompt's KV after the request's single token; its last output carries the hand-off."""

    lease_s: float


class TakeOver(msgspec.Struct, frozen=True):
    """Start from KV that another engine holds: it covers the first ``handoff.tokens`` prompt tokens."""

    handoff: KvHandoff


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. ``sampling`` is msgpack of vLLM's SamplingParams (a map).

    Lower ``priority`` is earlier: what waits for the engine is taken in this order, and of equals the first comer.
    """

    request_id: str
    token_ids: list[int]
    sampling: bytes
    priority: int = 0
    cache_salt: str | None = None
    session_id: str | None = None
    trace_headers: Mapping[str, str] | None = None
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: bytes = b""
    transfer: Hold | TakeOver | None = None
    rank: int | None = None
    """Which of the engine's data-parallel ranks; None: the engine chooses."""


class Logprobs(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Row-major ``[rows, width]``; column 0 is the sampled (or actual prompt) token; ``ranks`` is ``[rows]``."""

    width: int
    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class Finish(msgspec.Struct, frozen=True, gc=False):
    """Why a sequence ended. ``stop_token_id`` is None for the end-of-sequence token."""

    reason: FinishReason
    stop_token_id: int | None = None


class FirstOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Facts known with the first token. Durations in seconds on the engine's clock."""

    cached_tokens: int = 0
    external_tokens: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one step added to one request. ``token_ids`` holds only the new ones."""

    token_ids: list[int]
    finish: Finish | None = None
    first: FirstOutput | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    handoff: KvHandoff | None = None


OnOutput = Callable[[EngineOutput], None]
"""Takes a request's outputs, in the turn of the event loop in which the engine's step arrived."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and capacity of one engine incarnation."""

    epoch: int
    engine_id: str
    model: str
    engine_version: str
    layout_fingerprint: str
    block_size_tokens: int
    block_bytes: int
    kv_blocks_total: int
    context_tokens_max: int
    ranks: int = 1
    """Data-parallel ranks: each has an equal part of ``kv_blocks_total``, a queue and a prefix cache of its own."""
    host_blocks_total: int = 0
    """KV blocks that its host tier can hold. 0: it has none."""
    store_blocks_total: int = 0
    """KV blocks that the stores can hold which it shares with other engines. 0: it has none."""
    output_settings: str = ""
    """What decides its tokens besides ``layout_fingerprint``: names with digests of their values. Empty: unknown."""
    prefill_backoff_tokens: int = 0
    """Last tokens of a prompt that it does not compute when it holds the prompt's KV for another engine. Above 0, the
    token of a ``Hold`` is not the prompt's next one. The output leaves it out, and the taker computes it."""
    warm_s: float = 0.0
    """Time that its own first request took, at the end of its start."""


class RankLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one of several data-parallel ranks is doing; ``protos/cluster/v1`` documents each field."""

    requests_running: int = 0
    requests_waiting: int = 0
    kv_blocks_used: int = 0
    prefill_tokens_queued: int = 0


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. ``kv_blocks_used`` counts blocks that a request or a held hand-off owns; what follows only grows."""

    requests_running: int = 0
    requests_waiting: int = 0
    kv_blocks_used: int = 0
    kv_bytes_in: int = 0
    kv_bytes_out: int = 0
    kv_pull_s: float = 0.0
    """What the pulls of ``kv_bytes_in`` took, added up."""
    transports: tuple[str, ...] = ()
    """By which transports KV was pulled into this engine, sorted; "unknown" where that is not said."""
    pull_failures: int = 0
    """Pulls into this engine that failed; their prompts were computed here."""
    pulls_checked: int = 0
    """Pulls into this engine whose blocks had the holder's checksums."""
    pulls_attested: int = 0
    """Pulls not checked by content, for which the holder attested that it held the KV until they were over."""
    pulls_wrong: int = 0
    """Pulls whose blocks differed from the holder's; their prompts were computed here."""
    pulls_unproved: int = 0
    """Pulls whose lease ended first, or whose holder did not reply; their prompts were computed here."""
    leases_expired: int = 0
    """Held KV that was neither pulled nor released in time."""
    late_pulls: int = 0
    """Pulls out of this engine after its hold on the KV ended: the KV that was read may be wrong. Must stay 0."""
    steps: int = 0
    """Steps that the engine has reported, with or without output for a request: a sign of life."""
    tiers: tuple[TierStatus, ...] = ()
    """The KV tiers below the engine's own memory, from near to far; of data-parallel ranks, one after the other."""
    ranks: tuple[RankLoad, ...] = ()
    """Each of its data-parallel ranks, where it has several."""


class MeasuredStep(msgspec.Struct, frozen=True, gc=False):
    """What one step computed, and how long it took; ``protos/scheduler/v1`` documents each field."""

    duration_us: int
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_requests: int = 0
    decode_context_tokens: int = 0


MEASURED_STEPS_MAX = 8
"""Steps that an engine keeps until they are taken; older ones are forgotten."""


class EngineError(Exception):
    """Base of what an engine may raise."""


class EngineDead(EngineError):
    """The engine process is gone; nothing on it will ever finish."""


class InvalidRequest(EngineError):
    """The engine refuses this request for what it asks, in the engine's own words."""


class BlockListener(Protocol):
    """Hears which KV blocks an engine stores and removes, in batches that are numbered from 0."""

    @property
    def replay_from(self) -> int | None:
        """The first batch that is missing while later ones are here: the engine is to repeat from there."""
        ...

    def batch(self, seq: int, events: Sequence[EngineEvent] | None) -> None:
        """One batch, in any order and perhaps again. ``events``: None if they could not be read."""
        ...

    def replay_ended(self) -> None:
        """All that the engine kept has come."""
        ...

    def told(self, events: Sequence[EngineEvent]) -> None:
        """What came and went in stores; not numbered, in order, and never again."""
        ...


class Engine(Protocol):
    """One running engine. All methods are called from one event loop."""

    @property
    def info(self) -> EngineInfo:
        """Fixed for the life of this object."""
        ...

    @property
    def meter(self) -> WorkMeter:
        """Whose work its steps were. It is told of a step before the step's outputs are delivered."""
        ...

    async def generate(self, request: EngineRequest, on_output: OnOutput) -> None:
        """Run one sequence to its end: the output with ``finish`` is the last, and then this returns.

        All outputs of one step are delivered in one turn of the event loop, without a task for each request. Cancelling
        aborts: nothing is delivered any more, and KV of a ``Hold`` is freed if its hand-off was not delivered.
        Raises EngineError.
        """
        ...

    async def release(self, handoff_lease_id: str) -> None:
        """Free the KV a ``Hold`` kept. Idempotent; safe while or after it is pulled."""
        ...

    async def renew(self, handoff_lease_id: str, lease_s: float) -> None:
        """Keep the KV of a ``Hold`` for ``lease_s`` from now, if it is still held; never shorter than before."""
        ...

    def pulled(self, handoff_lease_id: str) -> None:
        """Another engine has this lease's KV. Changes nothing where the transfer layer has told the engine already."""
        ...

    def load(self) -> EngineLoad:
        """The latest known load, without waiting."""
        ...

    def take_steps(self) -> list[MeasuredStep]:
        """The last steps since this was called, oldest first; without waiting."""
        ...

    def report_blocks(self, listener: BlockListener, rank: int = 0) -> bool:
        """Tell it of all KV blocks of this rank since the engine began, until ``close``. False: this engine cannot.

        Call once a rank.
        """
        ...

    async def join_experts(self, role: str, scheduler_address: str) -> None:
        """Let the scheduler place the experts of its ranks, where it has any that run in parallel. Call once."""
        ...

    async def check_health(self) -> None:
        """Raise EngineDead when the engine can do no more work."""
        ...

    async def ping(self) -> None:
        """Return when the engine has answered between two steps. Waits while it hangs. Raises EngineError."""
        ...

    async def close(self) -> None:
        """Stop the engine and free what it holds, within the configured bound."""
        ...
