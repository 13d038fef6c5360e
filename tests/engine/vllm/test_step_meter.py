"""What a step computed, from what vLLM's scheduler says of it, and how long it took."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from engine.vllm.step_meter import StepMeter, make_up


def scheduled(
    counts: dict[str, int],
    *,
    new: dict[str, int] | None = None,
    cached: dict[str, int] | None = None,
    drafts: dict[str, list[int]] | None = None,
) -> Any:
    """A SchedulerOutput: tokens of each request in this step; ``new`` and ``cached``: its tokens before."""
    new, cached = new or {}, cached or {}
    return SimpleNamespace(
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=had) for name, had in new.items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[*cached], num_computed_tokens=[*cached.values()]),
        scheduled_spec_decode_tokens=drafts or {},
    )


class Clock:
    def __init__(self) -> None:
        self.now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


def test_sequences_that_decode_are_counted_with_their_tokens() -> None:
    assert make_up(scheduled({"a": 1, "b": 1}, cached={"a": 30, "b": 12})) == (0, 0, 2, 42)


def test_chunks_attend_to_what_is_before_them_and_to_themselves() -> None:
    step = scheduled({"a": 100, "b": 50, "c": 1}, new={"b": 32}, cached={"a": 200, "c": 7})
    assert make_up(step) == (150, 100 * 250 + 50 * 57, 1, 7)


def test_one_token_of_a_prompt_is_like_one_of_an_output() -> None:
    assert make_up(scheduled({"taken over": 1, "a": 1}, new={"taken over": 99}, cached={"a": 5})) == (0, 0, 2, 104)


def test_drafts_do_not_make_a_prompt() -> None:
    step = scheduled({"a": 4, "b": 3}, cached={"a": 30, "b": 60}, drafts={"a": [1, 2, 3]})
    assert make_up(step) == (3, 3 * 60 + 4, 1, 30)


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    clock = Clock()
    meter = StepMeter(clock)
    one = scheduled({"a": 1}, cached={"a": 5})
    meter.scheduling()
    clock.now_s += 0.25
    assert meter.ended(one, more=True) == [250_000, 0, 0, 1, 5]
    clock.now_s += 0.125
    meter.scheduling()
    clock.now_s += 0.125
    assert meter.ended(one, more=True) == [250_000, 0, 0, 1, 5]


def test_after_a_rest_it_lasts_from_its_own_beginning() -> None:
    clock = Clock()
    meter = StepMeter(clock)
    one = scheduled({"a": 1}, cached={"a": 5})
    meter.scheduling()
    assert meter.ended(one, more=False) is not None
    clock.now_s += 60.0
    meter.scheduling()
    # The next step is scheduled before this one is over.
    clock.now_s += 0.25
    meter.scheduling()
    clock.now_s += 0.25
    assert meter.ended(one, more=True) == [500_000, 0, 0, 1, 5]


def test_a_step_that_computes_nothing_is_none_and_its_time_counts_for_none() -> None:
    clock = Clock()
    meter = StepMeter(clock)
    assert meter.ended(scheduled({"a": 1}, cached={"a": 5}), more=True) is None
    clock.now_s += 5.0
    assert meter.ended(scheduled({}), more=True) is None
    clock.now_s += 0.5
    assert meter.ended(scheduled({"a": 1}, cached={"a": 5}), more=True) == [500_000, 0, 0, 1, 5]
