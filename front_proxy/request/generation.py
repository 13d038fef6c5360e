"""A generation as the serving layers ask for it, and the deltas they get back. Pure; decides nothing."""

from __future__ import annotations

from typing import Protocol

import msgspec

from engine.protocol import EngineRequest, Finish, Logprobs
from front_proxy.request.bill import Part
from front_proxy.request.prompt_keys import PromptKeys
from front_proxy.request.work import WorkerOutput


class Continuation(Protocol):
    """Encodes the sampling of work that starts behind tokens of the output, as msgpack of vLLM's SamplingParams."""

    def first(self, resume_tokens: int) -> bytes:
        """The next token alone, for a prefill of prompt + delivered tokens."""
        ...

    def rest(self, resume_tokens: int) -> bytes:
        """All that is left, for a decode of prompt + delivered tokens; at least one token is delivered."""
        ...


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence (one child of n > 1), and what the scheduler must know of it."""

    engine_request: EngineRequest
    """As one engine would be asked that computes everything, the first token included."""
    prefill_sampling: bytes
    """One token, computed on the prefill worker: msgpack of vLLM's SamplingParams."""
    continuation: Continuation | None
    """How an engine goes on behind delivered tokens as if undisturbed. None: it cannot. Then the prefill worker's token
    is not delivered, and what was delivered before a failure is computed again and compared."""
    output_tokens_max: int
    prompt_keys: PromptKeys | None = None
    """By which workers that hold part of the prompt's KV are found. None: no prefix cache can serve it."""
    priority_class: str = ""
    """"interactive", "default" or "batch". Empty: by the priority's number."""
    tenant: str = ""
    """The key of the fair share."""
    deadline_s: float | None = None
    """Time it may take from now. None: the configured one."""
    ttft_slo_s: float = 0.0
    """What is left of the time to the first token that its client asks for, from now. 0: none is asked for."""
    itl_slo_s: float = 0.0
    """The time between tokens that its client asks for. 0: none is."""
    account: Part | None = None
    """The part of its request's bill. None: nothing is counted."""
    pinned_decode_worker: str | None = None
    """Run on this decode worker alone, or this rank of it: its prefix cache already holds the prompt."""

    @property
    def request_id(self) -> str:
        """The client's request, or one child of it."""
        return self.engine_request.request_id


class TtftPhases(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time to the client's first token went, in seconds; the six add up to it. Unused ones are 0."""

    plan_s: float = 0.0
    """Request accepted until the (last) plan came, failed attempts before it included."""
    queue_s: float = 0.0
    """Waiting in the engine that computed the prompt."""
    prefill_s: float = 0.0
    """Computing the prompt."""
    first_token_out_s: float = 0.0
    """Everything else on the way: wire, worker, loop turns."""
    handoff_s: float = 0.0
    """KV moving to the decode worker, when the client's first token had to wait for it."""
    decode_admission_s: float = 0.0
    """Admission on the decode worker, when the client's first token had to wait for it."""

    @property
    def total_s(self) -> float:
        """Time to first token as the dispatcher measured it."""
        return float(sum(msgspec.structs.astuple(self)))


class GenerationDelta(msgspec.Struct, frozen=True, kw_only=True):
    """New output of one sequence. The last one has ``finish``. A delta without tokens carries facts only."""

    token_ids: list[int]
    finish: Finish | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    cached_tokens: int | None = None
    """Prompt tokens that no engine computed, wherever their KV lay; on the first delta."""
    decode_worker: str | None = None
    """Set once the prompt's KV lies on this decode worker, or this rank of it: siblings may be pinned there."""
    phases: TtftPhases | None = None
    """On the delta with the client's first token."""


def one_by_one(delta: GenerationDelta) -> list[GenerationDelta]:
    """The same with one token a delta. The prompt's logprobs come with the first of them, the end with the last."""
    last = len(delta.token_ids) - 1
    if last < 1:
        return [delta]
    return [
        msgspec.structs.replace(
            delta,
            token_ids=[token],
            finish=delta.finish if at == last else None,
            logprobs=None if delta.logprobs is None else rows(delta.logprobs, at, at + 1),
            prompt_logprobs=delta.prompt_logprobs if at == 0 else None,
        )
        for at, token in enumerate(delta.token_ids)
    ]


def rows(table: Logprobs, first: int, end: int | None = None) -> Logprobs:
    """The logprobs of the tokens from ``first`` up to ``end``."""
    cells = slice(first * table.width, None if end is None else end * table.width)
    return Logprobs(
        width=table.width,
        token_ids=table.token_ids[cells],
        logprobs=table.logprobs[cells],
        ranks=table.ranks[first:end],
    )


class PromptInfo:
    """What became known of a request's prompt; told once, with the client's first delta.

    The first word on each fact counts: a later attempt finds another attempt's cache.
    """

    __slots__ = ("_cached_tokens", "_prompt_logprobs", "told")

    def __init__(self) -> None:
        self.told = False
        """Something was given to the client."""
        self._cached_tokens: int | None = None
        self._prompt_logprobs: Logprobs | None = None

    def note(self, output: WorkerOutput) -> None:
        """What the worker that computes the prompt says of it; not a decode that takes over a prefill's KV."""
        if output.first is not None and self._cached_tokens is None:
            self._cached_tokens = output.first.cached_tokens + output.first.external_tokens
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs

    def delta(self, output: WorkerOutput, *, finish: Finish | None, decode_worker: str | None) -> GenerationDelta:
        """What the client gets of ``output``."""
        first, self.told = not self.told, True
        return GenerationDelta(
            token_ids=output.token_ids,
            finish=finish,
            logprobs=output.logprobs,
            prompt_logprobs=self._prompt_logprobs if first else None,
            cached_tokens=self._cached_tokens if first else None,
            decode_worker=decode_worker,
        )
