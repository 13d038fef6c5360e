"""Measured serving points of hardware that one does not have, from a file with AIConfigurator's columns."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from runtime.user_error import UserError

PARALLEL = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
_NAMED = ("model_path", "system", "backend", "precision")
_DISAGGREGATED = ("prefill_num_workers", "prefill_tp_size", "decode_num_workers", "decode_tp_size")
_REQUIRED = (*_NAMED, "mode", "isl", "osl", "batch_size", *PARALLEL, "silicon_ttft_ms", "silicon_tpot_ms")
_CONCURRENCY = re.compile(r"silicon_concurrency=(\d+)")


class BadSilicon(UserError):
    """The file does not hold measured points; the text names the line or the column."""


class Shape(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """What was measured. Points of one shape differ by their load only."""

    model: str
    system: str
    backend: str
    precision: str
    # Sizes by the order of ``PARALLEL``, as they are written; some files leave some of them out.
    parallel: tuple[str, ...]

    @property
    def tensor_parallel(self) -> int:
        """How many GPUs share each layer."""
        return int(float(self.parallel[0] or 1))

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(PARALLEL, self.parallel, strict=True) if size)
        return f"{self.model} on {self.system}, {self.backend} {self.precision}, {sizes}".replace(" ,", ",")


class Pools(msgspec.Struct, frozen=True, kw_only=True):
    """Of a disaggregated point: workers of each role, and the GPUs that share each layer."""

    prefill: int
    decode: int
    prefill_tensor_parallel: int
    decode_tensor_parallel: int


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: so many clients, each with one request at a time. ``pools`` None: one co-located engine."""

    shape: Shape
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    ttft_s: float
    tpot_s: float
    pools: Pools | None = None


class Points(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds. Of what was measured several times, the medians are one point."""

    co_located: Sequence[Point]
    disaggregated: Sequence[Point]
    repeated: int
    # Disaggregated ones that do not say how many workers they had.
    skipped: int


def read(file: Path) -> Points:
    """Read a file, plain or compressed with zstd. Raises BadSilicon."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise BadSilicon(f"{file} cannot be read: {error.strerror}") from None
    if file.suffix == ".zst":
        import zstandard

        try:
            raw = zstandard.ZstdDecompressor().stream_reader(raw).read()
        except zstandard.ZstdError as error:
            raise BadSilicon(f"{file} cannot be read: {error}") from None
    rows = csv.DictReader(io.StringIO(raw.decode(errors="replace")))
    if missing := sorted(set(_REQUIRED) - set(rows.fieldnames or ())):
        raise BadSilicon(f"{file} has no column {', '.join(missing)}")
    found: list[Point] = []
    skipped = 0
    for row in rows:
        try:
            point = _point(row)
        except ValueError as error:
            raise BadSilicon(f"{file} line {rows.line_num}: {error}") from None
        if point is None:
            skipped += 1
        else:
            found.append(point)
    if not found:
        raise BadSilicon(f"{file} has no point")
    points = _without_repetitions(found)
    return Points(
        co_located=[each for each in points if each.pools is None],
        disaggregated=[each for each in points if each.pools is not None],
        repeated=len(found) - len(points),
        skipped=skipped,
    )


def read_shape(file: Path, words: str) -> tuple[Shape, list[Point]]:
    """The co-located points of the one engine shape whose name has all words, between commas. Raises BadSilicon."""
    groups = by_shape(read(file).co_located)
    # "tp_size 2" is neither "moe_tp_size 2" nor "tp_size 20".
    each_one = [rf"(?<![a-z_]){re.escape(word.strip())}(?!\d)" for word in words.split(",")]
    fitting = [shape for shape in groups if all(re.search(one, str(shape), re.IGNORECASE) for one in each_one)]
    if len(fitting) != 1:
        names = "".join(f"\n  {len(groups[shape]):>3} points: {shape}" for shape in fitting or groups)
        raise BadSilicon(f"shape: {words!r} names {len(fitting) or 'none'} of the shapes in {file}:{names}")
    return fitting[0], groups[fitting[0]]


def by_shape(points: Iterable[Point]) -> dict[Shape, list[Point]]:
    """In the order of the points."""
    groups: dict[Shape, list[Point]] = {}
    for point in points:
        groups.setdefault(point.shape, []).append(point)
    return groups


def _point(row: Mapping[str, str | None]) -> Point | None:
    """None: a disaggregated one without worker counts. Raises ValueError with the column's name."""
    pools, concurrency = None, row["batch_size"]
    if row["mode"] == "disagg":
        if not all(row.get(name) for name in ("prefill_num_workers", "decode_num_workers")):
            return None
        counts = [_number(row, name, 1.0 if name.endswith("tp_size") else None) for name in _DISAGGREGATED]
        prefill, prefill_tp, decode, decode_tp = (int(count) for count in counts)
        pools = Pools(
            prefill=prefill, decode=decode, prefill_tensor_parallel=prefill_tp, decode_tensor_parallel=decode_tp
        )
        told = _CONCURRENCY.search(row.get("silicon_data_source") or "")
        concurrency = concurrency or (told[1] if told else None)
    return Point(
        shape=Shape(
            model=row["model_path"] or "",
            system=row["system"] or "",
            backend=row["backend"] or "",
            precision=row["precision"] or "",
            parallel=tuple(row[name] or "" for name in PARALLEL),
        ),
        prompt_tokens=int(_number(row, "isl")),
        output_tokens=int(_number(row, "osl")),
        concurrency=int(_number({"batch_size": concurrency}, "batch_size")),
        ttft_s=_number(row, "silicon_ttft_ms") / 1e3,
        tpot_s=_number(row, "silicon_tpot_ms") / 1e3,
        pools=pools,
    )


def _number(row: Mapping[str, str | None], name: str, without: float | None = None) -> float:
    text = row.get(name) or ""
    if not text and without is not None:
        return without
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e12:
        raise ValueError(f"{name} {text!r} is no number above 0")
    return value


def _without_repetitions(points: Iterable[Point]) -> list[Point]:
    groups: dict[tuple[object, ...], list[Point]] = {}
    for each in points:
        at = (each.shape, each.prompt_tokens, each.output_tokens, each.concurrency, each.pools)
        groups.setdefault(at, []).append(each)
    return [
        msgspec.structs.replace(
            group[0],
            ttft_s=statistics.median(each.ttft_s for each in group),
            tpot_s=statistics.median(each.tpot_s for each in group),
        )
        for group in groups.values()
    ]
