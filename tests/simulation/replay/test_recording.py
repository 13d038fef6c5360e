"""The files of a recording: bounded, whole, readable as a trace, and silent about what was said."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import zstandard

from kv_transfer.prefix import block_keys
from simulation.replay import traces
from simulation.replay.recording import RecordingFiles, Salted
from simulation.replay.traces import Arrival, Tally

NONE = Tally(recorded=0, dropped=0, unfinished=0)


def arrival(number: int, keys: tuple[int, ...] = ()) -> Arrival:
    return Arrival(arrived_s=float(number), prompt_tokens=64, output_tokens=1 + number, block_keys=keys)


def files(folder: Path, *, file_bytes_max: int = 1 << 20, files_max: int = 3) -> RecordingFiles:
    return RecordingFiles(folder, "trace", file_bytes_max=file_bytes_max, files_max=files_max)


def lines(path: Path) -> list[bytes]:
    with path.open("rb") as raw:
        return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True).read().splitlines()


def test_a_recording_is_a_trace_whose_last_line_says_what_is_left_out(tmp_path: Path) -> None:
    recording = files(tmp_path)
    wanted = [arrival(number, (number, 7)) for number in range(20)]
    for each in wanted:
        recording.write(each, 32, NONE)
        recording.flush(NONE)
    assert [path.name for path in tmp_path.iterdir()] == ["trace-00001.jsonl.zst.part"]
    recording.close(tally := Tally(recorded=20, dropped=4, unfinished=1))
    [path] = tmp_path.iterdir()
    assert path.name == "trace-00001.jsonl.zst" and list(recording.whole) == [path]
    trace = traces.read(path)
    assert (trace.key_tokens, list(trace.arrivals)) == (32, wanted)
    assert msgspec.json.decode(lines(path)[-1], type=Tally) == tally
    recording.close(tally)
    assert list(recording.whole) == [path]


def test_files_have_a_size_and_the_newest_are_kept_each_whole(tmp_path: Path) -> None:
    recording, rng = files(tmp_path, file_bytes_max=2_000, files_max=3), random.Random(1)
    for number in range(400):
        recording.write(arrival(number, (rng.getrandbits(56), rng.getrandbits(56))), 32, NONE)
        recording.flush(Tally(recorded=number + 1, dropped=0, unfinished=0))
        assert len(list(tmp_path.iterdir())) <= 3
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * 2_200
    recording.close(NONE)
    kept = sorted(tmp_path.iterdir())
    assert kept == list(recording.whole) and len(kept) == 3
    read = [each for path in kept for each in traces.read(path).arrivals]
    assert [each.arrived_s for each in read] == [float(number) for number in range(400 - len(read), 400)]
    whole = tmp_path / "all.zst"
    whole.write_bytes(b"".join(path.read_bytes() for path in kept))
    assert list(traces.read(whole).arrivals) == read


def test_another_block_size_begins_another_file_and_an_unknown_one_does_not(tmp_path: Path) -> None:
    recording = files(tmp_path)
    for number, key_tokens in enumerate((32, 0, 16)):
        recording.write(arrival(number), key_tokens, NONE)
    recording.close(NONE)
    assert [traces.read(path).key_tokens for path in recording.whole] == [32, 16]
    assert [len(traces.read(path).arrivals) for path in recording.whole] == [2, 1]


def test_a_recording_without_a_request_leaves_no_file(tmp_path: Path) -> None:
    recording = files(tmp_path)
    recording.flush(NONE)
    recording.close(NONE)
    assert list(tmp_path.iterdir()) == []


def test_salted_keys_say_what_is_shared_and_under_another_salt_are_others() -> None:
    one, other = (block_keys.prompt_keys([*range(64), *tail], 32) for tail in (range(64, 96), range(100, 132)))
    salted, again = Salted(b"x" * 32), Salted(b"y" * 32)
    first, second = salted.keys(one), salted.keys(other)
    assert len(first) == 3 and first[:2] == second[:2] and first[2] != second[2]
    assert not set(first) & set(again.keys(one)), "another recording, or the text, matches none of them"
    plain = {int.from_bytes(one[at : at + 8], "little") for at in range(0, len(one), 8)}
    assert not set(first) & plain


@pytest.mark.parametrize("tenant", ["name-team a", "key-0123456789abcdef"])
def test_tenants_are_told_apart_and_not_named(tenant: str) -> None:
    salted = Salted(b"x" * 32)
    assert salted.tenant(tenant) == salted.tenant(tenant) != salted.tenant("name-b")
    assert not any(part in salted.tenant(tenant) for part in ("team", "0123456789"))
    assert Salted(b"y" * 32).tenant(tenant) != salted.tenant(tenant)
    assert salted.tenant("") == ""
