"""Sampling parameters as they cross the wire, and when prompt + output so far is all an engine needs to go on.

Never touches a request's tokens.
"""

from __future__ import annotations

import secrets
from copy import copy
from typing import Any

import msgspec
from vllm.sampling_params import RequestOutputKind, SamplingParams

# Parameters with which an output can be continued exactly. Each depends only on the logits of one step, or on all
# tokens so far. It does not matter to them where the prompt ends.
_EXACT = frozenset(
    {
        "n",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop_token_ids",
        "ignore_eos",
        "max_tokens",
        "min_tokens",
        "logprobs",
        "prompt_logprobs",
        "logprob_token_ids",
        "logit_bias",
        "allowed_token_ids",
        "skip_reading_prefix_cache",
        "_eos_token_id",
        "_all_stop_token_ids",
    }
)
# Text, aggregation and bookkeeping: the engine sees none of it.
_FRONT_ONLY: dict[str, Any] = {
    "stop": [],
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stream_interval": None,
    "flat_logprobs": False,
    "output_text_buffer_length": 0,
    "detokenize": False,
    "output_kind": RequestOutputKind.DELTA,
    "skip_clone": False,
    "_watermarking_skipped": False,
}
# Fields that have other values than the default with which they are not used: all such values.
_RESTING: dict[str, tuple[Any, ...]] = {
    "watermarking": (None, False),
    "bad_words": (None, []),
    "extra_args": (None, {}),
    "_bad_words_token_ids": (None, []),
}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}
# A client that names the first two could point a worker at any host. The third lets an engine report reused blocks as
# stored once more.
_FORBIDDEN_EXTRA_ARGS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
_TEMPERATURE_GREEDY = 1e-5
_SEED_BITS = 63

_encoder = msgspec.msgpack.Encoder()


class Encodings(msgspec.Struct, frozen=True, kw_only=True):
    """msgpack of SamplingParams for each kind of work. Without ``continuation`` no engine can go on behind a token."""

    prefill: bytes
    decode: bytes
    continuation: Rest | None


class Rest:
    """The sampling of what is left of an output. Each encoding is made when it is asked for."""

    def __init__(self, whole: SamplingParams) -> None:
        self._whole = whole

    def first(self, resume_tokens: int) -> bytes:
        """For one token behind ``resume_tokens`` delivered ones."""
        wire = self._behind(resume_tokens)
        wire.max_tokens = 1
        wire.min_tokens = min(wire.min_tokens, 1)
        return _encoder.encode(wire)

    def rest(self, resume_tokens: int) -> bytes:
        """For all that is left behind ``resume_tokens`` delivered ones."""
        assert resume_tokens >= 1, resume_tokens
        return _encoder.encode(self._behind(resume_tokens))

    def _behind(self, resume_tokens: int) -> SamplingParams:
        wire = copy(self._whole)
        assert wire.max_tokens is not None and 0 <= resume_tokens < wire.max_tokens, (resume_tokens, wire.max_tokens)
        wire.max_tokens -= resume_tokens
        wire.min_tokens = max(wire.min_tokens - resume_tokens, 0)
        if resume_tokens:
            # Prompt logprobs were sent with the first token. Delivered tokens are not reported as part of the prompt.
            wire.prompt_logprobs = None
            wire.skip_reading_prefix_cache = False
        return wire


def continuable(params: SamplingParams) -> bool:
    """True when an engine may go on from prompt + output so far and give what one engine would have given.

    False for whatever depends on where the output began (presence and frequency penalties, bad words, grammars,
    thinking budgets, repetition detection), on a random stream that would start again (a seed with a temperature), and
    for every field this table does not know.
    """
    if params.seed is not None and params.temperature >= _TEMPERATURE_GREEDY:
        return False
    for name, default in _DEFAULTS.items():
        if name in _EXACT or name in _FRONT_ONLY or name == "seed":
            continue
        if getattr(params, name) not in _RESTING.get(name, (default,)):
            return False
    return True


def drop_forbidden(params: SamplingParams) -> None:
    """Take out, in place, what only Baton itself may say to an engine."""
    if not params.extra_args:
        return
    kept = {key: value for key, value in params.extra_args.items() if key not in _FORBIDDEN_EXTRA_ARGS}
    params.extra_args = kept or None


def encode(params: SamplingParams) -> Encodings:
    """The encodings for one sequence (n = 1) with parameters that passed vLLM's own validation.

    An output that is drawn at random and cannot be continued gets a seed if the client gave none: with it another
    engine can draw the same tokens again.
    """
    assert params.n == 1, params.n
    assert params.max_tokens is not None and params.max_tokens >= 1, params.max_tokens
    whole = _for_engine(params)
    if continuable(params):
        rest = Rest(whole)
        return Encodings(prefill=rest.first(0), decode=_encoder.encode(whole), continuation=rest)
    if whole.seed is None and whole.temperature >= _TEMPERATURE_GREEDY:
        whole.seed = secrets.randbits(_SEED_BITS)
    prefill = _encoder.encode(_discarded_token(params))
    return Encodings(prefill=prefill, decode=_encoder.encode(whole), continuation=None)


def _for_engine(params: SamplingParams) -> SamplingParams:
    wire = copy(params)
    for name, value in _FRONT_ONLY.items():
        setattr(wire, name, list(value) if isinstance(value, list) else value)
    return wire


def _discarded_token(params: SamplingParams) -> SamplingParams:
    """Compute the prompt; the token is thrown away, so nothing may end the request before its KV is held."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        prompt_logprobs=params.prompt_logprobs,
        skip_reading_prefix_cache=params.skip_reading_prefix_cache,
    )
