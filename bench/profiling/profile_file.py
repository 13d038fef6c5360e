"""The profile while it is measured, and when it is whole: what was measured before is not measured again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.profiling import grid
from engine.config import EngineConfig
from engine.protocol import EngineInfo
from runtime.user_error import UserError
from scheduler.cluster.latency_profile import Fingerprint, LatencyProfile
from scheduler.cluster.measurements import DecodeCell, HandoffCell, Measurements, PrefillCell
from scheduler.cluster.step_law import StepLaw
from simulation.sizing import profile_fit

PART_SUFFIX = ".part"
NOISE_MIN = 0.01

Measured = PrefillCell | DecodeCell | HandoffCell


class OtherProfile(UserError):
    """The file there was measured on something else; the text says what differs."""


class Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An unfinished profile."""

    fingerprint: Fingerprint
    prefill: dict[str, PrefillCell] = {}
    decode: dict[str, DecodeCell] = {}
    handoff: dict[str, HandoffCell] = {}

    @classmethod
    def begin(cls, output: Path, fingerprint: Fingerprint, *, force: bool) -> Part:
        """What an interrupted measurement left, or nothing yet. Raises OtherProfile."""
        fresh = cls(fingerprint=fingerprint)
        try:
            left = msgspec.json.decode(_beside(output).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError):
            return fresh
        names = Fingerprint.__struct_fields__
        differing = [name for name in names if getattr(left.fingerprint, name) != getattr(fingerprint, name)]
        if not differing:
            return left
        if force:
            return fresh
        told = ", ".join(f"{name} {getattr(left.fingerprint, name)!r}" for name in differing)
        raise OtherProfile(f"{_beside(output)} was begun with {told}; remove it, or give --force to begin again")

    def has(self, cell: grid.Cell) -> bool:
        """Whether it is measured."""
        return str(cell) in self._of(cell)

    def add(self, output: Path, cell: grid.Cell, measured: Measured) -> None:
        """Keep a cell, on disk too."""
        self._of(cell)[str(cell)] = measured
        _replace(_beside(output), msgspec.json.encode(self))

    def finish(self, output: Path, profile: LatencyProfile) -> None:
        """Write the whole profile. What was begun is not needed any more."""
        _replace(output, msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
        _beside(output).unlink(missing_ok=True)

    def _of(self, cell: grid.Cell) -> dict[str, Measured]:
        kinds = {grid.Prefill: self.prefill, grid.Decode: self.decode, grid.Handoff: self.handoff}
        return kinds[type(cell)]  # type: ignore[return-value] # each has the cells of its kind


def _beside(output: Path) -> Path:
    return output.with_name(output.name + PART_SUFFIX)


def _replace(file: Path, content: bytes) -> None:
    """At once: a reader finds the old or the new one."""
    new = file.with_name(file.name + ".new")
    new.write_bytes(content)
    new.replace(file)


def fingerprint(info: EngineInfo, config: EngineConfig, hardware: str) -> Fingerprint:
    """What the times depend on."""
    flags = {
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens or "vLLM's default",
        "block_size_tokens": info.block_size_tokens,
        "enforce_eager": config.enforce_eager,
        "cpu_threads": config.cpu_threads,
        **config.args,
    }
    text = ", ".join(f"{name} {value}" for name, value in flags.items())
    return Fingerprint(engine=f"{config.kind} {info.engine_version}", hardware=hardware, model=info.model, flags=text)


def whole(
    part: Part, info: EngineInfo, config: EngineConfig, *, requests_max: int, start_s: float, busy: str
) -> LatencyProfile:
    """The laws and what replays need, from the cells. ``busy``: why the machine was not free."""
    prefill, decode, handoff = tuple(part.prefill.values()), tuple(part.decode.values()), tuple(part.handoff.values())
    # Steps show the chunks of prompts; what is not set is larger than what was measured, or is seen in the curve.
    chunk_tokens = config.max_num_batched_tokens or max(each.uncached_tokens for each in prefill)
    law = profile_fit.fit_prefill(profile_fit.fit_decode(decode), prefill)
    spread = statistics.median(each.spread for each in (*prefill, *decode))
    if not busy and spread > profile_fit.SPREAD_MAX:
        busy = f"repetitions differ by {spread:.0%} (median): the machine did something else, or its clock changes"
    return LatencyProfile(
        version=2,
        fingerprint=part.fingerprint,
        step=StepLaw(**{name: getattr(law, name) for name in StepLaw.__struct_fields__}),
        chunk_tokens=chunk_tokens,
        kv_bytes_per_token=max(1, info.block_bytes // info.block_size_tokens),
        link=profile_fit.fit_link(handoff, law.fixed_s + law.decode_s(1, grid.HANDOFF_TOKENS[0])),
        measured=Measurements(
            kv_blocks_total=info.kv_blocks_total,
            block_size_tokens=info.block_size_tokens,
            sequences_max=config.max_num_seqs,
            requests_max=requests_max,
            gpus_per_worker=config.tensor_parallel_size,
            start_s=start_s,
            prefill=prefill,
            decode=decode,
            handoff=handoff,
            decode_sqrt_request_s=law.decode_sqrt_request_s,
            prefill_curve=law.prefill_curve,
            errors=profile_fit.errors(prefill, decode, chunk_tokens),
            noise=min(1.0, max(NOISE_MIN, spread)),
            not_good=busy,
        ),
    )


def sentences(profile: LatencyProfile) -> Sequence[str]:
    """What was found, for people."""
    measured = profile.measured
    assert measured is not None
    step, errors = profile.step, measured.errors
    longest = max(measured.prefill, key=lambda each: each.uncached_tokens)
    off = "left out, cells are {:.1%} off (median), {:.1%} at most"
    fixed, each_one = f"{step.fixed_s * 1e3:.2f} ms", f"{step.decode_request_s * 1e6:.0f} us"
    blocks = f"{measured.kv_blocks_total} blocks of {measured.block_size_tokens} tokens"
    rate = f"{longest.uncached_tokens / longest.seconds:.0f} tokens/s at {longest.uncached_tokens} tokens"
    return [
        f"{profile.fingerprint.model}, {profile.fingerprint.engine}, {profile.fingerprint.hardware}",
        f"prompts: {rate}; {off.format(errors.prefill_median, errors.prefill_worst)}",
        f"decode steps: {fixed} and {each_one} a sequence; {off.format(errors.decode_median, errors.decode_worst)}",
        f"hand-offs: {profile.link.latency_s * 1e3:.1f} ms and {profile.link.gigabytes_per_s:.2f} GB/s",
        f"KV: {blocks}; the engine started in {measured.start_s:.0f} s",
        *(f"above 10 %: {each}" for each in errors.flagged),
    ]
