"""The cluster model: what the replay assumes of engines and of the links between them, as one versioned JSON file.

Every worker is alike but for its role. The times are laws without noise; the replay adds that.
"""

from __future__ import annotations

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
    """The scheduler's law of a step and one term more: ``decode_sqrt_request_s * sqrt(b)``.

    The scheduler does not know it, as real engines have parts that no law has. It comes from measured points of vLLM
    (silicon sample of AIConfigurator): with it the median error of decode steps falls from 3.6 % to 1.3 %.
    """

    fixed_s: Positive
    prefill_token_s: Positive
    decode_sqrt_request_s: NonNegative = 0.0

    def decode_s(self, requests: int, context_tokens: int) -> float:
        """The part of the sequences that get one token each; they have ``context_tokens`` together."""
        return StepLaw.decode_s(self, requests, context_tokens) + self.decode_sqrt_request_s * math.sqrt(requests)


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
        if missing := sorted(known - self.sources.keys()):
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
