"""One message per engine step, whole and in order, within bounds."""

from __future__ import annotations

import asyncio

import pytest

from protos.worker.v1 import worker_pb2 as pb
from worker.config import WorkerLimits
from worker.output_batcher import OutputBatcher, OutputOverflow


def batcher(interval_s: float = 0.0, **bounds: int) -> OutputBatcher:
    return OutputBatcher(WorkerLimits(**bounds), interval_s)


def delta(slot: int, tokens: int = 1) -> pb.Delta:
    return pb.Delta(slot=slot, token_ids=[slot] * tokens)


def slots(step: pb.StepOutputs | None) -> list[int]:
    assert step is not None
    return [*step.token_slots, *(one.slot for one in step.deltas)]


async def test_a_message_holds_at_most_so_many_deltas_and_bytes_but_always_one() -> None:
    box = batcher(step_deltas_max=2, step_bytes_max=400)
    for slot, tokens in ((1, 1), (2, 1), (3, 1), (4, 1000), (5, 1)):
        box.append(delta(slot, tokens))
    assert [slots(await box.next_step()) for _ in range(4)] == [[1, 2], [3], [4], [5]]


@pytest.mark.parametrize("bounds", [{"waiting_deltas_max": 3}, {"waiting_bytes_max": 3 * 68}])
async def test_one_delta_too_many_is_an_error_and_is_not_kept(bounds: dict[str, int]) -> None:
    box = batcher(**bounds)
    for slot in range(3):
        box.append(delta(slot))
    with pytest.raises(OutputOverflow, match="3 deltas"):
        box.append(delta(3))
    assert slots(await box.next_step()) == [0, 1, 2]


async def test_tokens_that_gather_become_columns_in_front_of_their_slots_deltas() -> None:
    box = batcher()
    for token in range(3):
        box.append_tokens(1, [token])
        box.append_tokens(2, [10 + token])
    box.append_tokens(3, [])
    box.append(pb.Delta(slot=1, token_ids=[3], finish=pb.FINISH_REASON_LENGTH))
    box.append_tokens(2, [13])
    box.append_tokens(1, [99])
    box.append_tokens(1, [100])
    step = await box.next_step()
    assert step is not None
    assert (list(step.token_slots), list(step.token_counts)) == ([1, 2], [3, 4])
    assert list(step.token_ids) == [0, 1, 2, 10, 11, 12, 13]
    # The slot was taken by the next request before its last delta had left: what comes then stays behind it.
    assert [(one.slot, list(one.token_ids)) for one in step.deltas] == [(1, [3]), (1, [99]), (1, [100])]
    assert len(box) == 0
    box.append_tokens(1, [5])
    step = await box.next_step()
    assert step is not None
    assert (list(step.token_slots), list(step.token_counts), list(step.token_ids)) == ([1], [], [5])


async def test_what_does_not_fit_one_message_keeps_each_slots_order() -> None:
    box = batcher(step_deltas_max=2)
    for slot in (1, 2, 3):
        box.append_tokens(slot, [slot, slot])
    for slot in (3, 1):
        box.append(delta(slot))
    steps = [await box.next_step() for _ in range(3)]
    assert [slots(step) for step in steps] == [[1, 2], [3, 3], [1]]
    assert len(box) == 0


async def test_a_heavy_slot_goes_alone_and_bounds_hold_for_the_columns() -> None:
    box = batcher(step_bytes_max=100)
    for slot, count in ((1, 1), (2, 1000), (3, 1), (4, 1)):
        box.append_tokens(slot, [7] * count)
    assert [slots(await box.next_step()) for _ in range(3)] == [[1], [2], [3, 4]]
    assert len(box) == 0


async def test_tokens_are_copied_once_they_wait() -> None:
    box = batcher()
    made = [1]
    box.append_tokens(1, made)
    box.append_tokens(1, [2])
    assert made == [1]
    first = await box.next_step()
    box.append_tokens(1, [3])
    second = await box.next_step()
    assert first is not None
    assert second is not None
    assert (list(first.token_ids), list(second.token_ids)) == ([1, 2], [3])


async def test_tokens_wait_for_the_interval_and_leave_with_anything_that_does_not() -> None:
    box = batcher(interval_s=3600.0)
    box.append_tokens(1, [0])
    assert slots(await box.next_step()) == [1]  # nothing was sent before it
    reading = asyncio.create_task(box.next_step())
    box.append_tokens(1, [1])
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reading.done()
    box.append(delta(2))
    assert slots(await reading) == [1, 2]


async def test_tokens_leave_by_themselves_when_the_interval_is_over() -> None:
    box = batcher(interval_s=0.002)
    box.append_tokens(1, [0])
    await box.next_step()
    box.append_tokens(1, [1])
    assert slots(await asyncio.wait_for(box.next_step(), 5.0)) == [1]


async def test_tokens_count_towards_the_bounds_as_deltas_do() -> None:
    box = batcher(waiting_bytes_max=40, waiting_deltas_max=2)
    box.append_tokens(1, [0])
    box.append_tokens(2, [0])
    with pytest.raises(OutputOverflow, match="2 deltas"):
        box.append_tokens(3, [0])
    with pytest.raises(OutputOverflow, match="2 deltas"):
        box.append_tokens(1, [1, 2, 3, 4, 5])


async def test_closing_wakes_the_writer_and_drops_what_comes_later() -> None:
    box = batcher()
    reading = asyncio.create_task(box.next_step())
    await asyncio.sleep(0)
    box.close()
    box.append(delta(1))
    assert await reading is None
    assert await box.next_step() is None
    assert len(box) == 0
