"""Traces: what each format gives, and what is said of a bad file."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import zstandard

from simulation.replay import generators, traces
from simulation.replay.traces import Arrival, BadTrace

MOONCAKE = (
    b'{"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n'
    b'{"timestamp": 3000, "input_length": 512, "output_length": 1, "hash_ids": [0]}\n'
    b'{"timestamp": 6000, "input_length": 100, "output_length": 7, "hash_ids": [9]}\n'
)
AZURE = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 18:17:03.9799600,4808,10\r\n"
    b"2023-11-16 18:17:04.0319600,3180,8\r\n"
)
BATON = (
    b'{"baton_trace":1,"key_tokens":32}\n'
    b'{"arrived_s":0.5,"prompt_tokens":70,"output_tokens":3,"block_keys":[18446744073709551615,7],"tenant":"a"}\n'
)


def in_file(folder: Path, text: bytes, name: str = "trace") -> Path:
    (folder / name).write_bytes(text)
    return folder / name


def test_mooncakes_last_id_counts_only_if_its_block_is_full(tmp_path: Path) -> None:
    trace = traces.read(in_file(tmp_path, MOONCAKE))
    assert trace.key_tokens == 512
    assert [each.block_keys for each in trace.arrivals] == [(0, 1), (0,), ()]
    assert [(each.arrived_s, each.prompt_tokens, each.output_tokens) for each in trace.arrivals] == [
        (3.0, 1100, 5),
        (3.0, 512, 1),
        (6.0, 100, 7),
    ]


def test_arrivals_of_one_tick_are_spread_over_it_in_their_order(tmp_path: Path) -> None:
    trace = traces.read(in_file(tmp_path, MOONCAKE))
    times = [each.arrived_s for each in trace.spread(random.Random(1), load=1.0)]
    assert 0.0 < times[0] < times[1] < 3.0 < times[2] < 6.0
    twice = [each.arrived_s for each in trace.spread(random.Random(1), load=2.0)]
    assert twice == [at_s / 2 for at_s in times]
    assert times != [each.arrived_s for each in trace.spread(random.Random(2), load=1.0)]


def test_azures_time_stamps_are_taken_as_they_are(tmp_path: Path) -> None:
    trace = traces.read(in_file(tmp_path, AZURE))
    assert [(each.prompt_tokens, each.output_tokens) for each in trace.arrivals] == [(4808, 10), (3180, 8)]
    assert [each.arrived_s for each in trace.spread(random.Random(1), load=2.0)] == [0.0, pytest.approx(0.026)]


def test_a_trace_of_our_own_is_what_was_written(tmp_path: Path) -> None:
    trace = traces.read(in_file(tmp_path, BATON))
    assert trace.arrivals == [
        Arrival(arrived_s=0.5, prompt_tokens=70, output_tokens=3, block_keys=(18446744073709551615, 7), tenant="a")
    ]
    again = in_file(tmp_path, b"\n".join(traces.write(trace)), "again")
    assert traces.read(again) == trace


def test_files_of_one_recording_that_are_put_together_are_one_trace_in_order(tmp_path: Path) -> None:
    later, earlier = (
        traces.Trace(key_tokens=32, arrivals=[Arrival(arrived_s=at_s, prompt_tokens=1, output_tokens=1)])
        for at_s in (3.0, 1.0)
    )
    tally = msgspec.json.encode(traces.Tally(recorded=1, dropped=2, unfinished=3))
    both = b"\n".join([*traces.write(later), tally, *traces.write(earlier), tally])
    assert [each.arrived_s for each in traces.read(in_file(tmp_path, both)).arrivals] == [1.0, 3.0]


@pytest.mark.parametrize("text", [MOONCAKE, AZURE, BATON])
def test_a_compressed_trace_is_the_same(tmp_path: Path, text: bytes) -> None:
    lines = text.splitlines(keepends=True)
    frames = b"".join(zstandard.compress(line) for line in lines)
    compressed = in_file(tmp_path, frames, "trace.zst")
    assert traces.read(compressed) == traces.read(in_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "is empty"),
        (b"hello\n", "line 1: a format that none of mooncake, azure, timed_trace, aiperf, baton is"),
        (AZURE.splitlines()[0], "has no request"),
        (MOONCAKE.replace(b"512", b"0"), "line 2: .*input_length"),
        (MOONCAKE.replace(b'"output_length": 7, ', b""), "line 3: .*output_length"),
        (MOONCAKE.replace(b"6000", b"2000"), "line 3: timestamp is before"),
        (MOONCAKE[:-4], "line 3: "),
        (AZURE.replace(b"3180", b"many"), "line 3: ContextTokens 'many' is no number of tokens"),
        (AZURE.replace(b",8\r", b"\r"), "line 3: 2 columns"),
        (AZURE.replace(b"2023-11-16 18:17:03", b"yesterday"), "line 2: TIMESTAMP 'yesterday"),
        (BATON.replace(b"7]", b"7,8]"), "line 2: block_keys has more keys"),
        (BATON.replace(b'"tenant"', b'"who"'), "line 2: .*who"),
        (BATON.replace(b'"baton_trace":1', b'"baton_trace":2'), "line 1: .*baton_trace"),
        (BATON + b'\n{"baton_trace":1,"key_tokens":16}', "line 4: key_tokens is 16, and 32 above: two recordings"),
        (BATON + b'\n{"recorded":1}', "line 4: .*dropped"),
    ],
)
def test_a_bad_file_is_told_by_its_line_and_field(tmp_path: Path, text: bytes, told: str) -> None:
    with pytest.raises(BadTrace, match=told):
        traces.read(in_file(tmp_path, text))


def test_a_file_that_is_not_there_or_not_compressed_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadTrace, match="cannot be read"):
        traces.read(tmp_path / "none")
    with pytest.raises(BadTrace, match="cannot be read"):
        traces.read(in_file(tmp_path, MOONCAKE, "trace.zst"))


@pytest.mark.parametrize("kind", list(generators.SHAPES))
def test_made_traffic_has_what_its_name_says(kind: str) -> None:
    trace = generators.made(kind, 400, per_s=2.0, seed=3)
    assert trace == generators.made(kind, 400, per_s=2.0, seed=3)
    assert trace != generators.made(kind, 400, per_s=2.0, seed=4)
    assert len(trace.arrivals) == 400
    times = [each.arrived_s for each in trace.arrivals]
    assert times == sorted(times)
    seen: set[int] = set()
    keys = hits = 0
    for each in trace.arrivals:
        assert len(each.block_keys) == each.prompt_tokens // trace.key_tokens
        keys += len(each.block_keys)
        hits += len(seen.intersection(each.block_keys))
        seen.update(each.block_keys)
    shared = hits / keys
    tokens_out = sum(each.output_tokens for each in trace.arrivals) / 400
    if kind == "reasoning":
        assert 4500 < tokens_out < 7500
        assert trace.output_tokens_max == 32768
    else:
        assert tokens_out < 400
        assert shared > {"multi-turn": 0.5, "shared-prompt": 0.9, "agents": 0.8, "summarisation": -1.0}[kind]


def test_what_vllm_replays_is_in_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    file = tmp_path / "timed.jsonl"
    file.write_text(
        '{"timestamp": 1.5, "input_length": 40, "output_length": 5, "hash_ids": [7, 8, 9]}\n'
        '{"timestamp": 2.0, "input_length": 16, "output_length": 5, "hash_ids": [7]}\n'
    )
    found = traces.read(file)
    assert (found.key_tokens, found.ticks) == (16, False)
    assert [each.arrived_s for each in found.arrivals] == [1.5, 2.0]
    assert [each.block_keys for each in found.arrivals] == [(7, 8), (7,)]


def test_records_of_aiperf_are_read_without_failures_and_warm_up(tmp_path: Path) -> None:
    def record(start_ns: int, metrics: str, phase: str = "profiling") -> str:
        return (
            f'{{"metadata": {{"request_start_ns": {start_ns}, "benchmark_phase": "{phase}"}}, "metrics": {metrics}}}\n'
        )

    whole = '{"input_sequence_length": {"value": 550, "unit": "tokens"}, "output_sequence_length": {"value": 9}}'
    lines = [record(3_000_000_000, whole), record(1_000_000_000, whole), record(2, whole, "warmup")]
    file = tmp_path / "profile_export.jsonl"
    file.write_text("".join([*lines, record(9, '{"error_isl": {"value": 550}}')]))
    found = traces.read(file)
    assert [(each.arrived_s, each.prompt_tokens, each.output_tokens) for each in found.arrivals] == [
        (0.0, 550, 9),
        (2.0, 550, 9),
    ]
    file.write_text("".join([*lines, "{}\n"]))
    with pytest.raises(traces.BadTrace, match="line 4: "):
        traces.read(file)
