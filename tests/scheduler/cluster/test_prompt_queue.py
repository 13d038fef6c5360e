"""How long a worker is busy with prompts, from plans and reports."""

from __future__ import annotations

import pytest

from scheduler.cluster.prompt_queue import PromptQueue

VISIBLE_AFTER_S = 0.1


@pytest.fixture
def queue() -> PromptQueue:
    """Two prompts, of one second and of two, at time 0."""
    queue = PromptQueue()
    queue.add((1, 1), 1000, 1.0, 0.0)
    queue.add((1, 2), 2000, 2.0, 0.0)
    return queue


def test_the_one_in_front_is_computed_meanwhile(queue: PromptQueue) -> None:
    assert queue.wait_s(0.0) == 3.0
    assert queue.wait_s(0.4) == pytest.approx(2.6)
    # It takes longer than it was predicted to; the others are still to be computed.
    assert queue.wait_s(9.0) == 2.0


def test_fewer_tokens_mean_that_the_oldest_is_done(queue: PromptQueue) -> None:
    queue.reported(3000, 0.5, VISIBLE_AFTER_S)
    assert list(queue) == [(1, 1), (1, 2)]
    queue.reported(2000, 1.2, VISIBLE_AFTER_S)
    assert list(queue) == [(1, 2)]
    # The second one has been computed for the last 0.2 s.
    assert queue.wait_s(1.2) == pytest.approx(1.8)
    queue.reported(0, 3.0, VISIBLE_AFTER_S)
    assert len(queue) == 0
    assert queue.wait_s(3.0) == 0.0
    queue.check()


def test_a_report_says_nothing_of_prompts_on_their_way(queue: PromptQueue) -> None:
    assert queue.unreported == 2
    queue.reported(0, 0.05, VISIBLE_AFTER_S)
    assert (len(queue), queue.unreported) == (2, 2)
    queue.reported(3000, 0.2, VISIBLE_AFTER_S)
    assert queue.unreported == 0
    queue.add((1, 3), 10, 0.1, 0.2)
    assert queue.unreported == 1


def test_tokens_that_no_plan_explains_are_counted(queue: PromptQueue) -> None:
    queue.reported(3700, 0.2, VISIBLE_AFTER_S)
    assert queue.unknown_tokens == 700
    queue.reported(3000, 0.3, VISIBLE_AFTER_S)
    assert queue.unknown_tokens == 0


def test_a_plan_that_ends_takes_its_prompt_with_it(queue: PromptQueue) -> None:
    queue.drop((1, 1), 0.4)
    assert queue.wait_s(0.5) == pytest.approx(1.9)
    queue.drop((1, 1), 0.6)
    queue.drop((1, 2), 0.6)
    assert queue.wait_s(0.7) == 0.0
    queue.check()
