"""The usage record: one a request, whatever was tried again. What its client is billed, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

# What comes from another process is bounded where it is read.
Tokens = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Microseconds = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Outcome = Literal["finished", "length", "cancelled", "failed", "refused_midway", "unknown"]


class AttemptWork(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What one attempt took of one worker. ``estimated``: its worker did not tell, and this is a lower bound."""

    worker_id: str
    stage: str
    """"prefill" or "decode"."""
    computed_tokens: Tokens = 0
    """Tokens of the prompt that its engine computed."""
    cached_tokens: Tokens = 0
    """Those found in its own cache."""
    pulled_tokens: Tokens = 0
    """Those whose KV came from another engine."""
    decoded_tokens: Tokens = 0
    """Output tokens that it made."""
    prefill_us: Microseconds = 0
    """Its share of the engine's steps, for its prompt; decode_us: for its output."""
    decode_us: Microseconds = 0
    estimated: bool = False


_work = msgspec.msgpack.Decoder(AttemptWork).decode


def work_of(packed: bytes) -> AttemptWork:
    """What a worker told of an attempt. Where that cannot be read, that there was one."""
    try:
        return _work(packed)
    except (ValueError, RecursionError):
        return AttemptWork(worker_id="", stage="", estimated=True)


class UsageRecord(msgspec.Struct, kw_only=True, array_like=True, gc=False):
    """Written once, when the scheduler has filled in what is its own.

    Billed tokens are those of the ``usage`` that the client saw: a prompt once, also of n > 1.
    """

    uid: bytes
    """16 bytes by chance, made when the request came."""
    key_id: str
    team: str
    model: str
    """That served: aliases are resolved."""
    api: str
    priority_class: str
    outcome: Outcome
    prompt_tokens: Tokens = 0
    cached_tokens: Tokens = 0
    """Of the prompt."""
    output_tokens: Tokens = 0
    amount: int = 0
    """In nano-units. The scheduler's."""
    rules_version: str = ""
    """Of the rules whose price it is. The scheduler's."""
    attempts: tuple[AttemptWork, ...] = ()
    estimated: bool = False
    """No process told it: what was held is billed."""
    window_s: float = 0.0
    """A moment of the windows that it counts in. The scheduler's; began_s and ended_s are its front proxy's time."""
    began_s: float = 0.0
    ended_s: float = 0.0
    ttft_s: float = 0.0
    told: tuple[bytes, ...] = ()
    """``attempts`` as their workers packed them: read when it is written."""

    @property
    def cost(self) -> tuple[int, int, int, int]:
        """Of all attempts: engine time in us, that of the prompt, tokens computed of it, and tokens discarded.

        Discarded is output that engines made and the client is not billed for.
        """
        prefill_us = decode_us = computed = decoded = 0
        for each in self.attempts:
            prefill_us += each.prefill_us
            decode_us += each.decode_us
            computed += each.computed_tokens
            decoded += each.decoded_tokens
        return prefill_us + decode_us, prefill_us, computed, max(0, decoded - self.output_tokens)


class _Named(msgspec.Struct, array_like=True, gc=False):
    uid: bytes


_record = msgspec.msgpack.Decoder(UsageRecord).decode
_records = msgspec.msgpack.Decoder(list[UsageRecord]).decode
_raw_records = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_named = msgspec.msgpack.Decoder(_Named).decode


def records_of(packed: bytes) -> tuple[list[UsageRecord], Sequence[tuple[bytes, str]]]:
    """The records of a list; then the uid of each that cannot be read, empty where that cannot be either, and why."""
    try:
        return _records(packed), ()
    except (ValueError, RecursionError) as error:
        records, unread = list[UsageRecord](), list[tuple[bytes, str]]()
        try:
            raw_records = _raw_records(packed)
        except (ValueError, RecursionError):
            return [], [(b"", str(error))]
    for raw in raw_records:
        try:
            records.append(_record(raw))
        except (ValueError, RecursionError) as error:
            unread.append((_uid_of(raw), str(error)))
    return records, unread


def _uid_of(raw: msgspec.Raw) -> bytes:
    try:
        return _named(raw).uid
    except (ValueError, RecursionError):
        return b""
