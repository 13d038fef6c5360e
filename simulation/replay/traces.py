"""Recorded traffic: readers of others' formats and of Baton's own, plain or compressed with zstd.

Others' are traces of Mooncake and Azure, what `vllm bench serve` replays as timed_trace, and AIPerf's records.

Baton's own format is JSON lines. The first is ``{"baton_trace": 1, "key_tokens": N}``, each further one an ``Arrival``,
in any order; a recording ends with a ``Tally``. Files of one recording that are put together are one trace.
Its block keys are salted, so they tell which prompts share a beginning and nothing about what is in it.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import msgspec

from runtime.bounds import PositiveCount
from runtime.user_error import UserError

Format = Literal["mooncake", "azure", "timed_trace", "aiperf", "baton"]

MOONCAKE_KEY_TOKENS = 512
TIMED_KEY_TOKENS = 16
"""vLLM's default, and that of Alibaba's traces. Their time stamps are seconds."""
MADE_KEY_TOKENS = 512
"""Of traffic without keys in it, and of traffic that is made."""
OUTPUT_TOKENS_MAX = 2048
"""What clients allow, unless an output of the trace is longer: then the next power of two, for every request alike."""
LINE_BYTES_MAX = 16 * 1024 * 1024
_HEADER_BEGIN, _TALLY_BEGIN = b'{"baton_trace"', b'{"recorded"'

Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]


class BadTrace(UserError):
    """The file does not hold a trace; the text names the line and the field."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One request, ``arrived_s`` after the beginning. A key for each full block of the prompt; none: nothing shared."""

    arrived_s: Seconds
    prompt_tokens: PositiveCount
    output_tokens: PositiveCount
    block_keys: tuple[int, ...] = ()
    priority_class: str = "default"
    tenant: str = ""


class Trace(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Arrivals in the order of time. ``key_tokens``: prompt tokens of each block key."""

    key_tokens: int
    arrivals: Sequence[Arrival]
    # Whether equal time stamps mean one tick of the recorder, not arrivals at one moment.
    ticks: bool = False

    @property
    def output_tokens_max(self) -> int:
        """What every client allows."""
        longest = max(each.output_tokens for each in self.arrivals)
        return OUTPUT_TOKENS_MAX if longest <= OUTPUT_TOKENS_MAX else 1 << (longest - 1).bit_length()

    @property
    def rate_rps(self) -> float:
        """Requests a second, as recorded."""
        return len(self.arrivals) / max(1e-9, self.arrivals[-1].arrived_s - self.arrivals[0].arrived_s)

    def spread(self, rng: random.Random, load: float) -> Sequence[Arrival]:
        """The arrivals from 0 s on, ``load`` times as fast. Those of one tick are spread evenly over it, by chance."""
        first_s = self.arrivals[0].arrived_s
        groups = [list(group) for _, group in itertools.groupby(self.arrivals, key=lambda each: each.arrived_s)]
        starts = [group[0].arrived_s for group in groups]
        lengths = [later - earlier for earlier, later in itertools.pairwise(starts)]
        lengths.append(lengths[-1] if lengths else 0.0)
        return [
            msgspec.structs.replace(each, arrived_s=(start_s - first_s + offset_s) / load)
            for group, start_s, length_s in zip(groups, starts, lengths, strict=True)
            for each, offset_s in zip(
                group,
                sorted(rng.random() * length_s for _ in group) if self.ticks else itertools.repeat(0.0),
                strict=False,
            )
        ]


class _Hashed(msgspec.Struct):
    """A line of a Mooncake trace, or of one for vLLM. Its last id may stand for a block that is not full."""

    timestamp: Annotated[float, msgspec.Meta(ge=0.0)]
    input_length: PositiveCount
    output_length: PositiveCount
    hash_ids: tuple[int, ...] = ()


class _Tokens(msgspec.Struct):
    value: PositiveCount


class _Measured(msgspec.Struct):
    input_sequence_length: _Tokens | None = None
    output_sequence_length: _Tokens | None = None


class _Metadata(msgspec.Struct):
    request_start_ns: Annotated[int, msgspec.Meta(ge=0)]
    benchmark_phase: str = "profiling"


class _Record(msgspec.Struct):
    """A line of AIPerf's ``profile_export.jsonl``. A failed request has no lengths."""

    metadata: _Metadata
    metrics: _Measured


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    baton_trace: Literal[1]
    key_tokens: PositiveCount


class Tally(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What a recording came to so far: the last line of each of its files.

    ``unfinished``: requests without an output that could be replayed: refused, failed, or not over yet.
    """

    recorded: int
    dropped: int
    unfinished: int


def read(file: Path, form: Format | None = None) -> Trace:
    """Read a trace. Without ``form`` its first line tells the format. Raises BadTrace."""
    with _lines(file) as lines:
        number, first = next(lines, (0, b""))
        if not number:
            raise BadTrace(f"{file} is empty")
        form = form or _format_of(first)
        if form is None:
            raise BadTrace(f"{file} line {number}: a format that none of {', '.join(_READERS)} is")
        trace = _READERS[form](file, itertools.chain([(number, first)], lines))
    if not trace.arrivals:
        raise BadTrace(f"{file} has no request")
    return trace


def write(trace: Trace) -> Iterator[bytes]:
    """The lines of Baton's own format, without line ends."""
    yield header(trace.key_tokens)
    for arrival in trace.arrivals:
        yield msgspec.json.encode(arrival)


def header(key_tokens: int) -> bytes:
    """The first line of Baton's own format."""
    return msgspec.json.encode(_Header(baton_trace=1, key_tokens=key_tokens))


Lines = Iterable[tuple[int, bytes]]


@contextmanager
def _lines(file: Path) -> Iterator[Iterator[tuple[int, bytes]]]:
    """The lines that are not empty, each with its number."""
    broken: tuple[type[Exception], ...] = (OSError,)
    try:
        with file.open("rb") as raw:
            source: io.BufferedIOBase = raw
            if file.suffix == ".zst":
                try:
                    import zstandard
                except ImportError:
                    raise BadTrace(f"{file}: decompress it, or install the package zstandard") from None
                broken = (OSError, zstandard.ZstdError)
                decompressor = zstandard.ZstdDecompressor()
                source = io.BufferedReader(decompressor.stream_reader(raw, read_across_frames=True))
            yield (
                (number, line)
                for number, line in enumerate(iter(lambda: source.readline(LINE_BYTES_MAX), b""), start=1)
                if line.strip()
            )
    except broken as error:
        raise BadTrace(f"{file} cannot be read: {error}") from None


def _format_of(first: bytes) -> Format | None:
    if first.startswith(b"TIMESTAMP"):
        return "azure"
    if b'"baton_trace"' in first:
        return "baton"
    if b'"request_start_ns"' in first:
        return "aiperf"
    if b'"input_length"' not in first:
        return None
    try:
        each = msgspec.json.decode(first, type=_Hashed)
    except msgspec.DecodeError:
        return "mooncake"  # Its reader says what is wrong.
    # A hash for every 16 tokens at most, or for every 512.
    return "timed_trace" if len(each.hash_ids) * TIMED_KEY_TOKENS >= each.input_length else "mooncake"


def _fail(file: Path, number: int, why: object) -> NoReturn:
    raise BadTrace(f"{file} line {number}: {why}") from None


def _mooncake(file: Path, lines: Lines) -> Trace:
    return _hashed(file, lines, MOONCAKE_KEY_TOKENS, 1000.0, ticks=True)


def _timed_trace(file: Path, lines: Lines) -> Trace:
    return _hashed(file, lines, TIMED_KEY_TOKENS, 1.0, ticks=False)


def _hashed(file: Path, lines: Lines, key_tokens: int, units_per_s: float, *, ticks: bool) -> Trace:
    decoder = msgspec.json.Decoder(_Hashed)
    arrivals: list[Arrival] = []
    for number, line in lines:
        try:
            each = decoder.decode(line)
        except msgspec.DecodeError as error:
            _fail(file, number, error)
        arrival = Arrival(
            arrived_s=each.timestamp / units_per_s,
            prompt_tokens=each.input_length,
            output_tokens=each.output_length,
            block_keys=each.hash_ids[: each.input_length // key_tokens],
        )
        _append(file, number, arrivals, arrival, "timestamp")
    return Trace(key_tokens=key_tokens, arrivals=arrivals, ticks=ticks)


def _aiperf(file: Path, lines: Lines) -> Trace:
    """Requests that failed, and those of warm-up, are left out. Nothing tells which prompts share a beginning."""
    decoder = msgspec.json.Decoder(_Record)
    found: list[tuple[int, int, int]] = []
    for number, line in lines:
        try:
            each = decoder.decode(line)
        except msgspec.DecodeError as error:
            _fail(file, number, error)
        prompt, output = each.metrics.input_sequence_length, each.metrics.output_sequence_length
        if prompt and output and each.metadata.benchmark_phase == "profiling":
            found.append((each.metadata.request_start_ns, prompt.value, output.value))
    found.sort()
    arrivals = [
        Arrival(arrived_s=(at_ns - found[0][0]) / 1e9, prompt_tokens=prompt, output_tokens=output)
        for at_ns, prompt, output in found
    ]
    return Trace(key_tokens=MADE_KEY_TOKENS, arrivals=arrivals)


def _azure(file: Path, lines: Lines) -> Trace:
    """Columns TIMESTAMP, ContextTokens, GeneratedTokens."""
    arrivals: list[Arrival] = []
    began: datetime | None = None
    for number, line in itertools.islice(lines, 1, None):
        cells = line.decode(errors="replace").strip().split(",")
        if len(cells) != 3:
            _fail(file, number, f"{len(cells)} columns instead of TIMESTAMP,ContextTokens,GeneratedTokens")
        try:
            at = datetime.fromisoformat(cells[0])
            began = began or at
            passed_s = (at - began).total_seconds()
        except (ValueError, TypeError):
            _fail(file, number, f"TIMESTAMP {cells[0]!r} is no time")
        counts = []
        for name, cell in zip(("ContextTokens", "GeneratedTokens"), cells[1:], strict=True):
            if not cell.isdecimal() or not int(cell):
                _fail(file, number, f"{name} {cell!r} is no number of tokens")
            counts.append(int(cell))
        arrival = Arrival(arrived_s=passed_s, prompt_tokens=counts[0], output_tokens=counts[1])
        _append(file, number, arrivals, arrival, "TIMESTAMP")
    return Trace(key_tokens=MADE_KEY_TOKENS, arrivals=arrivals)


def _baton(file: Path, lines: Lines) -> Trace:
    decoder = msgspec.json.Decoder(Arrival)
    arrivals: list[Arrival] = []
    key_tokens = 0
    for number, line in lines:
        try:
            if not key_tokens or line.startswith(_HEADER_BEGIN):
                told = msgspec.json.decode(line, type=_Header).key_tokens
                if key_tokens not in (0, told):
                    _fail(file, number, f"key_tokens is {told}, and {key_tokens} above: two recordings")
                key_tokens = told
                continue
            if line.startswith(_TALLY_BEGIN):
                msgspec.json.decode(line, type=Tally)
                continue
            arrival = decoder.decode(line)
        except msgspec.DecodeError as error:
            _fail(file, number, error)
        if len(arrival.block_keys) * key_tokens > arrival.prompt_tokens:
            _fail(file, number, f"block_keys has more keys than prompt_tokens has full blocks of {key_tokens}")
        arrivals.append(arrival)
    # A request is recorded when it ends.
    arrivals.sort(key=lambda each: each.arrived_s)
    return Trace(key_tokens=key_tokens, arrivals=arrivals)


def _append(file: Path, number: int, arrivals: list[Arrival], arrival: Arrival, field: str) -> None:
    if arrivals and arrival.arrived_s < arrivals[-1].arrived_s:
        _fail(file, number, f"{field} is before that of the line above")
    arrivals.append(arrival)


_READERS: dict[Format, Callable[[Path, Lines], Trace]] = {
    "mooncake": _mooncake,
    "azure": _azure,
    "timed_trace": _timed_trace,
    "aiperf": _aiperf,
    "baton": _baton,
}
