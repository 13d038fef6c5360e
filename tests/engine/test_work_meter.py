"""The shares of all requests add up to the engine's time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.work_meter import Share, WorkMeter


def test_a_step_is_shared_by_its_tokens() -> None:
    meter = WorkMeter()
    long, short = meter.begin(), meter.begin()
    meter.step(900, 90, 0)
    long.first(60, 0, 0)
    short.first(40, 10, 0)
    for _ in range(4):
        meter.step(100, 0, 2)
    one = short.end()
    meter.step(100, 0, 1)
    other = long.end()
    assert (one.computed_tokens, one.cached_tokens, one.prefill_us, one.decode_us) == (30, 10, 300, 200)
    assert (other.computed_tokens, other.prefill_us, other.decode_us) == (60, 600, 300)
    assert meter.engine_us == 900 + 4 * 100 + 100


def test_a_prompt_whose_kv_was_pulled_takes_its_one_token_of_the_step() -> None:
    meter = WorkMeter()
    share = meter.begin()
    meter.step(70, 0, 1)
    share.first(50, 0, 49)
    meter.step(30, 0, 1)
    work = share.end()
    assert (work.computed_tokens, work.pulled_tokens, work.prefill_us, work.decode_us) == (1, 49, 0, 100)


def test_a_prompt_that_is_given_up_leaves_its_time_to_the_one_that_is_left() -> None:
    meter = WorkMeter()
    given_up, other = meter.begin(), meter.begin()
    meter.step(100, 100, 0)
    assert given_up.end().prefill_us == 0
    other.first(10, 0, 0)
    assert other.end().prefill_us == 100


def test_steps_that_compute_what_was_given_up_are_paid_by_what_runs() -> None:
    meter = WorkMeter()
    meter.step(1000, 0, 1)  # the engine starts
    given_up, other = meter.begin(), meter.begin()
    meter.step(200, 0, 2)
    given_up.first(10, 9, 0)
    other.first(10, 9, 0)
    spent_us = given_up.end().decode_us
    meter.step(60, 0, 2)
    spent_us += other.end().decode_us
    meter.step(40, 0, 1)  # no request's yet
    late = meter.begin()
    meter.step(100, 100, 0)
    late.first(100, 0, 0)
    work = late.end()
    assert (spent_us, work.prefill_us) == (100 + 160, 140)
    assert spent_us + work.prefill_us == meter.engine_us - 1000


class Engine:
    """Computes prompts in chunks and decodes, as vLLM does."""

    def __init__(self) -> None:
        self.meter = WorkMeter()
        self.left: dict[Share, tuple[int, int, int]] = {}
        self.spent_us = 0
        self.late = 0

    def add(self, prompt: int, output: int) -> None:
        self.left[self.meter.begin()] = prompt, prompt, output

    def step(self, chunk: int, duration_us: int, *, late: bool) -> None:
        prefill = 0
        # Outputs that were left a step ago are in this step yet.
        decode, self.late = self.late, 0
        over = []
        for share, (prompt, left, output) in self.left.items():
            if left > 1:
                taken = min(chunk, left)
                if taken == 1:
                    continue
                prefill += taken
                self.left[share] = prompt, left - taken, output
            else:
                decode += 1
                self.left[share] = prompt, 0, output - 1
                over.append(share)
        self.meter.step(duration_us, prefill, decode)
        for share, (prompt, left, output) in list(self.left.items()):
            if left == 0 and share not in over:
                share.first(prompt, 0, 0)
            if left == 0 and output <= 0:
                self.late += late
                self.spent_us += (work := share.end()).prefill_us + work.decode_us
                del self.left[share]


@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(1, 12)), min_size=1, max_size=8),
    st.lists(st.integers(1, 5_000), min_size=1, max_size=20),
    st.integers(8, 64),
    st.booleans(),
)
def test_whatever_runs_together_the_shares_add_up(
    requests: list[tuple[int, int]], durations_us: list[int], chunk: int, late: bool
) -> None:
    engine = Engine()
    for prompt, output in requests:
        engine.add(2 * prompt, output)
    turn = 0
    while engine.left:
        engine.step(2 * chunk, durations_us[turn % len(durations_us)], late=late)
        turn += 1
    assert abs(engine.spent_us - engine.meter.engine_us) <= 2 * len(requests)
