"""The latency profile: how fast one engine on one hardware is, as one versioned JSON file. Learns nothing.

The scheduler starts from it and learns on (``latency_model``). Not learnt is the time of a hand-off: workers say how
many bytes they pulled and not in what time, so link and bytes are what the file says.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

import msgspec

from runtime.bounds import PositiveCount
from runtime.user_error import UserError
from scheduler.cluster.measurements import Learnt, Measurements
from scheduler.cluster.step_law import LinkLaw, StepLaw


class BadLatencyProfile(UserError):
    """The file does not hold a latency profile; the text names the file and the field."""


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of what the times are."""

    # Name and version, such as "vllm 0.32.0".
    engine: str = ""
    hardware: str = ""
    model: str = ""
    # Engine settings that times depend on.
    flags: str = ""


class LatencyProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The times of one engine, for a worker of either role."""

    # 2: `baton profile` wrote it, with ``measured``. 3: of workers that served, with ``learnt`` too.
    version: Literal[1, 2, 3] = 1
    fingerprint: Fingerprint = Fingerprint()
    # About a 30B model on one accelerator.
    step: StepLaw = StepLaw(
        fixed_s=0.02, prefill_token_s=1e-4, prefill_pair_s=1e-9, decode_request_s=1e-4, decode_context_token_s=2e-8
    )
    # Prompt tokens of a step at most: vLLM's max_num_batched_tokens, here its smallest default. Larger steps show more.
    chunk_tokens: PositiveCount = 2048
    kv_bytes_per_token: PositiveCount = 262_144
    # Of a 100 Gbit/s network.
    link: LinkLaw = LinkLaw(gigabytes_per_s=10.0, latency_s=0.005)
    # Of no use to the scheduler, which learns; `baton plan` needs it.
    measured: Measurements | None = None
    # Of no use to either: what it was learnt from.
    learnt: Learnt | None = None


ASSUMED = LatencyProfile()
"""What is believed without a file. A few steps are worth more."""


def load(file: Path) -> LatencyProfile:
    """Read a profile. Raises BadLatencyProfile."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=LatencyProfile)
    except OSError as error:
        raise BadLatencyProfile(f"{file} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise BadLatencyProfile(f"{file} is no latency profile: {error}{_advice(str(error))}") from None


def _advice(error: str) -> str:
    """The known field that an unknown one may stand for."""
    unknown = re.search(r"unknown field `([^`]*)`", error)
    kinds = (LatencyProfile, Fingerprint, StepLaw, LinkLaw)
    known = [name for kind in kinds for name in kind.__struct_fields__]
    near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
    return f"; did you mean {near[0]}?" if near else ""
