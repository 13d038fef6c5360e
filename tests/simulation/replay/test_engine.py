"""Simulated engines against times computed by hand, and closed forms against single steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.api.worker_info import WorkerState
from scheduler.api.worker_progress import EngineStep
from simulation.kernel.world import World
from simulation.replay.cluster_model import ClusterModel
from simulation.replay.engine import Engine
from simulation.replay.work import Work
from tests.simulation.replay.models import KEY_TOKENS, Told, cluster_model


class StepByStep(Engine):
    """The same engine without its closed forms."""

    def _steps_with_room(self, steps: int) -> int:
        return 1


def engine_of(model: ClusterModel, kind: type[Engine] = Engine) -> tuple[Engine, Told, World]:
    world = World(0)
    told = Told(world)
    return kind("decode-0", "decode", model, KEY_TOKENS, world, told), told, world


def test_a_prompt_is_computed_in_chunks_of_the_token_budget() -> None:
    model = cluster_model()
    engine, told, world = engine_of(model)
    engine.submit(Work(0, (), 2500, 1))
    world.run(10.0)
    # Three steps; 2,500 tokens; pairs: 1000 * 500 + 1000 * 1500 + 500 * 2250.
    assert told.first_s[0] == pytest.approx(3 * 0.01 + 0.25 + 1e-7 * 3_125_000)
    assert told.first_s[0] == pytest.approx(model.idle_prefill_s(2500))
    assert told.last_s == told.first_s
    assert [step.prefill_tokens for step in engine.steps] == [1000, 1000, 500]
    assert [step.prefill_pairs for step in engine.steps] == [500_000, 1_500_000, 1_125_000]
    assert engine.empty
    engine.check()


def test_decode_steps_take_longer_with_their_context() -> None:
    engine, told, world = engine_of(cluster_model())
    engine.submit(Work(0, (), 100, 4))
    world.run(10.0)
    steps = [0.01 + 0.001 + 1e-6 * context for context in (100, 101, 102)]
    assert told.last_s[0] - told.first_s[0] == pytest.approx(sum(steps))
    assert told.gap_tokens == 3
    assert told.gaps_s == pytest.approx(sum(steps))
    last = engine.steps[-1]
    assert last == EngineStep(last.duration_s, 0, 0, 1, 102)
    assert last.duration_s == pytest.approx(steps[-1])


def test_a_prompt_slows_the_sequences_that_decode_beside_it() -> None:
    engine, _, world = engine_of(cluster_model())
    engine.submit(Work(0, (), 100, 50))
    world.after(0.2, engine.submit, Work(1, (), 500, 1))
    world.run(10.0)
    mixed = [step for step in engine.steps if step.prefill_tokens and step.decode_requests]
    assert len(mixed) == 1
    context = mixed[0].decode_context_tokens
    assert mixed[0].duration_s == pytest.approx(0.01 + 0.05 + 1e-7 * 125_000 + 0.001 + 1e-6 * context)


def test_what_lies_here_is_not_computed_again_but_for_the_last_token() -> None:
    engine, _, world = engine_of(cluster_model())
    engine.submit(Work(0, (1, 2), 128, 1))
    world.run(1.0)
    again = Work(1, (1, 2), 128, 1)
    longer = Work(2, (1, 2, 3), 200, 1)
    engine.submit(again)
    engine.submit(longer)
    world.run(2.0)
    assert (again.cached_tokens, longer.cached_tokens) == (64, 128)
    assert engine.prefill_tokens == 128 + 64 + 72


def test_a_pull_moves_the_blocks_that_are_missing() -> None:
    engine, told, world = engine_of(cluster_model())
    engine.submit(Work(0, (1, 2), 150, 1))
    world.run(1.0)
    lent = Work(1, (1, 2, 3), 200, 1)
    onward = Work(1, (1, 2, 3), 200, 5)
    onward.source, onward.last_s = (engine, lent), 0.9
    engine.submit(onward)
    assert told.pulls == [(1, 72)]
    load, *_ = engine.report()
    assert (load.state, load.requests_waiting, load.prefill_tokens_queued) == (WorkerState.READY, 1, 200)
    world.run(5.0)
    # Its second token comes one step after the pull; the client waited since the first.
    assert told.last_s[1] == pytest.approx(1.5 + sum(0.011 + 1e-6 * context for context in range(200, 205)))
    assert told.gaps_s == pytest.approx(told.last_s[1] - 0.9)
    assert engine.pool.used == 0
    engine.check()


def test_what_is_lent_is_held_until_it_is_let_go() -> None:
    engine, told, world = engine_of(cluster_model(kv_blocks_total=20))
    lent, waiting = Work(0, (1,), 200, 1, lends=True), Work(1, (), 200, 1)
    engine.submit(lent)
    engine.submit(waiting)
    world.run(1.0)
    assert list(told.first_s) == [0]
    assert engine.report()[0].leases_held == 1
    engine.let_go(lent)
    world.run(2.0)
    assert told.first_s[1] == pytest.approx(1.0 + 0.01 + 0.02 + 1e-7 * 20_000)
    assert engine.empty
    engine.check()


def test_a_sequence_without_a_block_makes_the_last_one_give_way() -> None:
    # 10 blocks of 16 tokens: both fit until they have grown.
    engine, told, world = engine_of(cluster_model(kv_blocks_total=10))
    engine.submit(Work(0, (), 64, 60))
    engine.submit(Work(1, (), 64, 60))
    world.run(60.0)
    assert engine.preemptions > 0
    assert told.last_s[0] < told.last_s[1], "the first one keeps its place"
    assert told.gap_tokens == 2 * 59
    engine.check()
    assert engine.pool.used == 0


_works = st.lists(
    st.tuples(
        st.floats(0.0, 0.5), st.integers(1, 500), st.integers(1, 120), st.integers(0, 2), st.booleans(), st.booleans()
    ),
    min_size=1,
    max_size=25,
)


@given(_works, st.integers(40, 120))
def test_closed_forms_give_what_single_steps_give(
    works: list[tuple[float, int, int, int, bool, bool]], blocks: int
) -> None:
    ends = []
    for kind in (Engine, StepByStep):
        engine, told, world = engine_of(cluster_model(kv_blocks_total=blocks, sequences_max=8), kind)
        at_s = 0.0
        for number, (later_s, tokens, output, family, keyed, pulled) in enumerate(works):
            at_s += later_s
            keys = tuple(family * 100 + index for index in range(tokens // KEY_TOKENS)) if keyed else ()
            work = Work(number, keys, tokens, output)
            if pulled:
                work.source, work.last_s = (engine, work), at_s
            world.at(at_s, engine.submit, work)
        world.run(3600.0)
        assert sorted(told.last_s) == list(range(len(works))), "each ends"
        # Of one that is pulled, the first token came before.
        assert told.gap_tokens == sum(output - (not pulled) for _, _, output, _, _, pulled in works)
        assert engine.empty
        engine.check()
        ends.append((told.last_s, told.gaps_s, engine.preemptions, engine.prefill_tokens))
    closed, single = ends
    assert closed[0] == pytest.approx(single[0], abs=1e-6)
    assert closed[1] == pytest.approx(single[1])
    assert closed[2:] == single[2:]


def test_a_report_in_the_middle_of_many_steps_says_what_is_so_then() -> None:
    reports = []
    for kind in (Engine, StepByStep):
        engine, _, world = engine_of(cluster_model(), kind)
        for number in range(5):
            engine.submit(Work(number, (), 50 + 7 * number, 400))
        looks: list[tuple[int, int]] = []
        rng = random.Random(1)
        for _ in range(50):
            world.run(world.now_s + rng.random() / 10)
            load, *_ = engine.report()
            looks.append((load.kv_blocks_used, load.requests_running))
        reports.append(looks)
    assert reports[0] == reports[1]
