"""vLLM's statistics become the few numbers that Baton reports."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from msgspec import to_builtins

from engine.protocol import MEASURED_STEPS_MAX, EngineLoad, MeasuredStep
from engine.vllm.load import LoadRecorder
from engine.vllm.step_meter import STEP
from kv_transfer.prefix.events import BlocksFound, BlocksRemoved, EngineEvent, Medium
from kv_transfer.prefix.events import to_builtins as to_event_builtins
from kv_transfer.tiers.status import BLOCKS_REPORTED_AS, REPORTED_AS, TierStatus

NIXL = {
    "bytes_transferred": [100, 20],
    "transfer_duration": [0.5, 0.25],
    "baton_transports": ["cma"],
    "baton_blocks_out": [3],
    "num_kv_expired_reqs": [1],
    "num_failed_handshakes": [1],
}


def step(stats: Mapping[str, object] | None) -> SimpleNamespace:
    return SimpleNamespace(
        kv_cache_usage=0.25,
        num_running_reqs=2,
        num_waiting_reqs=1,
        num_skipped_waiting_reqs=3,
        kv_connector_stats=stats,
    )


def test_usage_becomes_blocks_and_transfers_add_up() -> None:
    recorder = LoadRecorder()
    recorder.set_capacity(blocks=400, block_bytes=10)
    recorder.record(step(NIXL), None)
    recorder.record(step(NIXL), None)
    assert recorder.load() == EngineLoad(
        requests_running=2,
        requests_waiting=4,
        kv_blocks_used=100,
        kv_bytes_in=240,
        kv_bytes_out=60,
        kv_pull_s=1.5,
        transports=("cma",),
        leases_expired=2,
        pull_failures=2,
        steps=2,
    )


def test_a_multi_connectors_numbers_are_found_by_their_shape() -> None:
    recorder = LoadRecorder()
    recorder.record(step({"NixlConnector": {"data": NIXL}, "OffloadingConnector": {"data": {"other": 1}}}), None)
    assert recorder.load().kv_bytes_in == 120


def test_a_step_without_statistics_changes_nothing() -> None:
    recorder = LoadRecorder()
    recorder.record(None, None)
    recorder.record(step(None), None)
    assert recorder.load().kv_bytes_in == 0


def test_measured_steps_are_kept_until_they_are_taken() -> None:
    recorder = LoadRecorder()
    for number in range(MEASURED_STEPS_MAX + 2):
        recorder.record(step({**NIXL, STEP: [number, 1, 2, 3, 4]}), None)
    taken = recorder.take_steps()
    assert len(taken) == MEASURED_STEPS_MAX
    assert taken[0] == MeasuredStep(2, 1, 2, 3, 4)
    assert recorder.take_steps() == []
    assert recorder.load().kv_bytes_in == (MEASURED_STEPS_MAX + 2) * 120


def test_blocks_in_stores_are_told_from_the_start_on_to_whoever_listens() -> None:
    event = BlocksFound(hashes=[7], parents=[None], digests=[b"digest7"], medium=Medium.FILE)
    gone = BlocksRemoved(hashes=[7], medium=Medium.FILE)
    heard: list[EngineEvent] = []
    recorder = LoadRecorder()
    for events in ([event], [gone]):
        data = {REPORTED_AS: [], BLOCKS_REPORTED_AS: to_event_builtins(events)}
        recorder.record(step({"NixlConnector": {"data": NIXL}, "TierConnector": {"data": data}}), None)
        recorder.report_store_blocks(heard.extend)
    assert heard == [event, gone]
    data = {REPORTED_AS: [], BLOCKS_REPORTED_AS: to_event_builtins([event])}
    recorder.record(step({"NixlConnector": {"data": NIXL}, "TierConnector": {"data": data}}), None, engine_idx=1)
    assert heard == [event, gone], "another rank's are its own listener's"
    recorder.report_store_blocks(heard.extend, rank=1)
    assert heard == [event, gone, event]


def test_the_latest_status_of_every_ranks_tiers_is_kept() -> None:
    def told(hits: int) -> dict[str, object]:
        status = TierStatus(name="host", hits=hits)
        return {"NixlConnector": {"data": NIXL}, "TierConnector": {"data": {REPORTED_AS: [to_builtins(status)]}}}

    recorder = LoadRecorder()
    recorder.record(step(told(1)), None)
    recorder.record(step(told(2)), None, engine_idx=1)
    recorder.record(step(told(3)), None)
    recorder.record(step(NIXL), None)
    assert [tier.hits for tier in recorder.load().tiers] == [3, 2]
    assert recorder.load().kv_bytes_in == 4 * 120
