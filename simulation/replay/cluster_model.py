"""The cluster model: what the replay assumes of engines and of the links between them, as one versioned JSON file.

Every worker is alike but for its role. The times are laws without noise; the replay adds that.
"""

from __future__ import annotations

import bisect
import math
from pathlib import Path
from typing import Literal

import msgspec

from runtime.bounds import Fraction, NonNegative, Positive, PositiveCount
from runtime.user_error import UserError
from scheduler.cluster.step_law import LinkLaw, StepLaw


class BadClusterModel(UserError):
    """The file does not hold a cluster model; the text names the file and the field."""


class StepTimes(StepLaw, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """The scheduler's law of a step and two parts more, which the scheduler does not know, as with real engines.

    ``decode_sqrt_request_s * sqrt(b)`` comes from measured points of vLLM (silicon sample of AIConfigurator): with it
    the median error of decode steps falls from 3.6 % to 1.3 %. ``prefill_curve``, measured points of (prompt tokens of
    a step, seconds) with lines between them, takes the place of ``prefill_token_s * q`` up to its end. A quadratic is
    12 to 19 % off (Splitwise's measurements), since small chunks do not fill a GPU.
    """

    fixed_s: Positive
    prefill_token_s: Positive
    decode_sqrt_request_s: NonNegative = 0.0
    prefill_curve: tuple[tuple[PositiveCount, NonNegative], ...] = ()

    def decode_s(self, requests: int, context_tokens: int) -> float:
        """The part of the sequences that get one token each; they have ``context_tokens`` together."""
        return StepLaw.decode_s(self, requests, context_tokens) + self.decode_sqrt_request_s * math.sqrt(requests)

    def prefill_s(self, tokens: int, pairs: float) -> float:
        """The part of the prompt tokens; ``pairs`` is sum(q_i * (c_i + q_i / 2))."""
        curve = self.prefill_curve
        if not curve:
            return StepLaw.prefill_s(self, tokens, pairs)
        pairs_s, (last, last_s) = self.prefill_pair_s * pairs, curve[-1]
        if tokens >= last:
            return last_s + self.prefill_token_s * (tokens - last) + pairs_s
        end = bisect.bisect_right(curve, (tokens, math.inf))
        (x0, y0), (x1, y1) = curve[end - 1] if end else (0, 0.0), curve[end]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0) + pairs_s

    def prompt_s(self, uncached_tokens: int, cached_tokens: int, chunk_tokens: int) -> float:
        """A prompt alone on its engine, in chunks of at most ``chunk_tokens``; ``cached_tokens`` of it are there."""
        if not self.prefill_curve:
            return StepLaw.prompt_s(self, uncached_tokens, cached_tokens, chunk_tokens)
        whole, rest = divmod(uncached_tokens, chunk_tokens)
        pairs = uncached_tokens * (cached_tokens + 0.5 * uncached_tokens)
        chunks_s = whole * (self.fixed_s + self.prefill_s(chunk_tokens, 0.0))
        rest_s = self.fixed_s + self.prefill_s(rest, 0.0) if rest else 0.0
        return chunks_s + rest_s + self.prefill_pair_s * pairs


class ClusterModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One engine shape and its link. ``sources``: where the value of each field comes from, by the field's path."""

    version: Literal[1]
    name: str
    block_size_tokens: PositiveCount
    # Blocks of ``block_size_tokens`` that one worker has for KV.
    kv_blocks_total: PositiveCount
    kv_bytes_per_token: PositiveCount
    # vLLM's max_num_batched_tokens and max_num_seqs.
    batched_tokens_max: PositiveCount
    sequences_max: PositiveCount
    # What a worker admits beyond that waits at the worker. Baton's worker.requests_max.
    requests_max: PositiveCount
    step: StepTimes
    # Of steps with prompt tokens, where engines compute these in another way; None: ``step`` is of all.
    prompt_step: StepTimes | None = None
    link: LinkLaw
    # One message between client, front proxy, scheduler and worker.
    message_s: NonNegative = 0.0
    # Standard deviation of every simulated time, as a share of it.
    noise: Fraction = 0.05
    sources: dict[str, str]

    def __post_init__(self) -> None:
        known = {*_paths(ClusterModel), *_paths(StepTimes, "step."), *_paths(LinkLaw, "link.")}
        known -= {"version", "name", "step", "prompt_step", "link", "sources"}
        if self.prompt_step is not None:
            known |= {*_paths(StepTimes, "prompt_step.")}
        curves = {"step.prefill_curve", "prompt_step.prefill_curve"}
        if missing := sorted(known - self.sources.keys() - curves):
            raise ValueError(f"sources says nothing about {', '.join(missing)}")
        if unknown := sorted(self.sources.keys() - known):
            raise ValueError(f"sources names what is no value: {', '.join(unknown)}")

    @property
    def prompts(self) -> StepTimes:
        """The law of steps with prompt tokens."""
        return self.prompt_step or self.step

    def idle_prefill_s(self, tokens: int) -> float:
        """What an idle worker takes for a prompt of which it holds nothing."""
        return self.prompts.prompt_s(tokens, 0, self.batched_tokens_max)

    def transfer_s(self, tokens: int) -> float:
        """How long the KV of so many tokens occupies the links of both ends."""
        return self.link.occupied_s(tokens * self.kv_bytes_per_token)


def _paths(kind: type[msgspec.Struct], before: str = "") -> list[str]:
    return [before + name for name in kind.__struct_fields__]


def load(file: Path) -> ClusterModel:
    """Read a cluster model. Raises BadClusterModel."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=ClusterModel)
    except OSError as error:
        raise BadClusterModel(f"{file} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise BadClusterModel(f"{file} is no cluster model: {error}") from None
