"""One suite for every Engine: what the workers rely on, whichever engine is behind it."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import random
import signal
from typing import Any

import msgspec
import psutil
import pytest

from engine.protocol import Engine, EngineOutput, EngineRequest, Finish, Hold, InvalidRequest, TakeOver
from tests.contract.conftest import Pair
from tests.support.engines import collect, first_of, prefill, request, tokens_of
from tests.support.polling import until

pytestmark = pytest.mark.asyncio(loop_scope="session")

SETTLE_S = 5.0
_prompts = itertools.count()


def prompt(length: int) -> list[int]:
    """A prompt no other test has used, so that no prefix cache hides a missing transfer."""
    number = next(_prompts)
    chooser = random.Random(number)
    return [3 + number % 500, *(chooser.randrange(3, 512) for _ in range(length - 1))]


async def settles(engine: Engine) -> bool:
    """Whether nothing is held or running within the bound. Load is told by the engine's steps: polled, not awaited."""

    def idle() -> bool:
        load = engine.load()
        return not (load.kv_blocks_used or load.requests_running or load.requests_waiting)

    try:
        await until(idle, within_s=SETTLE_S)
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("token_sent", [False, True], ids=["from the prompt", "behind its first token"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
async def test_decode_continues_a_held_prefill_as_one_engine_would(
    engines: Pair, length: int, token_sent: bool
) -> None:
    tokens = prompt(length)
    token, handoff = await prefill(engines.prefill, tokens)
    assert handoff.tokens == length
    sent = token if token_sent else []
    continued = await collect(engines.decode, request([*tokens, *sent], TakeOver(handoff), max_tokens=8 - len(sent)))
    assert sent + tokens_of(continued) == tokens_of(await collect(engines.prefill, request(tokens)))
    external = first_of(continued).external_tokens
    assert external == length or (external == length - 1 and not token_sent)


async def test_a_pull_moves_bytes_and_frees_the_prefill_side(engines: Pair) -> None:
    await settles(engines.prefill)
    before_in, before_out = engines.decode.load().kv_bytes_in, engines.prefill.load().kv_bytes_out
    tokens = prompt(100)
    _, handoff = await prefill(engines.prefill, tokens)
    await collect(engines.decode, request(tokens, TakeOver(handoff)))
    assert await settles(engines.prefill)
    assert await settles(engines.decode)
    assert engines.decode.load().kv_bytes_in - before_in == handoff.bytes
    assert engines.prefill.load().kv_bytes_out - before_out == handoff.bytes
    # Named by UCX itself, of the real ones: both are on this machine.
    load = engines.decode.load()
    assert load.transports in (("fake",), ("cma",)) and load.kv_pull_s > 0
    assert engines.prefill.load().transports == ()


async def test_release_frees_a_held_prefill_and_may_be_repeated(engines: Pair) -> None:
    _, handoff = await prefill(engines.prefill, prompt(100))
    assert handoff.blocks == -(-100 // engines.prefill.info.block_size_tokens)
    await engines.prefill.release(handoff.lease_id)
    assert await settles(engines.prefill)
    await engines.prefill.release(handoff.lease_id)
    await engines.prefill.release("never held")
    assert tokens_of(await collect(engines.prefill, request(prompt(3))))


async def test_a_held_prefill_counts_as_used_until_its_lease_runs_out(engines: Pair) -> None:
    await settles(engines.prefill)
    await prefill(engines.prefill, prompt(100), lease_s=0.5)
    assert engines.prefill.load().kv_blocks_used >= 4
    assert await settles(engines.prefill)


async def leave_after(engine: Engine, wanted: EngineRequest, seconds: float) -> list[EngineOutput]:
    """Cancel a generation after some time, if it is not over by then; what was given out until then."""
    outputs: list[EngineOutput] = []
    running = asyncio.ensure_future(engine.generate(wanted, outputs.append))
    await asyncio.wait([running], timeout=seconds)
    running.cancel()
    await asyncio.wait([running])
    given_out = len(outputs)
    await asyncio.sleep(0)
    assert len(outputs) == given_out
    return outputs


async def test_leaving_many_at_once_leaves_no_work_and_no_kv_behind(engines: Pair) -> None:
    """Most of them are still waiting or half computed: only an abort in the engine ends those."""
    chooser = random.Random(9)
    wanted = [request(prompt(900), Hold(lease_s=60.0), max_tokens=1) for _ in range(30)]
    wanted += [request(prompt(100), max_tokens=800) for _ in range(10)]
    left = await asyncio.gather(*(leave_after(engines.prefill, one, chooser.random() * 0.2) for one in wanted))
    for outputs in left:
        for output in outputs:
            if output.handoff is not None:
                await engines.prefill.release(output.handoff.lease_id)
    assert await settles(engines.prefill)


async def test_leaving_while_the_kv_is_under_way_frees_both_sides(engines: Pair) -> None:
    chooser = random.Random(8)
    for _ in range(20):
        tokens = prompt(500)
        _, handoff = await prefill(engines.prefill, tokens)
        await leave_after(engines.decode, request(tokens, TakeOver(handoff)), chooser.random() * 0.02)
        await engines.prefill.release(handoff.lease_id)
    assert await settles(engines.decode)
    assert await settles(engines.prefill)


async def test_leaving_right_after_the_handoff_was_given_out_leaves_it_to_its_receiver(engines: Pair) -> None:
    tokens = prompt(100)
    outputs: list[EngineOutput] = []

    def take(output: EngineOutput) -> None:
        outputs.append(output)
        running.cancel()

    running = asyncio.ensure_future(engines.prefill.generate(request(tokens, Hold(lease_s=60.0), max_tokens=1), take))
    await asyncio.wait([running])
    handoff = outputs[-1].handoff
    assert handoff is not None
    continued = await collect(engines.decode, request(tokens, TakeOver(handoff)))
    assert first_of(continued).external_tokens >= 99


async def test_a_listener_that_fails_costs_its_own_request_only(engines: Pair) -> None:
    def refuse(output: EngineOutput) -> None:
        raise RuntimeError("the listener is broken")

    broken = request(prompt(40), Hold(lease_s=60.0), max_tokens=1)
    other, result = await asyncio.gather(
        collect(engines.prefill, request(prompt(40))),
        engines.prefill.generate(broken, refuse),
        return_exceptions=True,
    )
    assert isinstance(result, Exception)
    assert not isinstance(other, BaseException)
    assert len(tokens_of(other)) == 8
    assert await settles(engines.prefill)


async def test_kv_that_was_only_said_to_be_pulled_is_freed(engines: Pair) -> None:
    _, handoff = await prefill(engines.prefill, prompt(100))
    # The engines are the module's: leases of other tests may have run out before.
    expired = engines.prefill.load().leases_expired
    engines.prefill.pulled(handoff.lease_id)
    engines.prefill.pulled(handoff.lease_id)
    assert await settles(engines.prefill)
    assert engines.prefill.load().leases_expired == expired


async def test_a_handoff_that_cannot_be_read_is_computed_again(engines: Pair) -> None:
    tokens = prompt(100)
    _, handoff = await prefill(engines.prefill, tokens)
    await engines.prefill.release(handoff.lease_id)
    unreadable = msgspec.structs.replace(handoff, engine_id="gone-1", connector_params=b"")
    continued = await collect(engines.decode, request(tokens, TakeOver(unreadable)))
    assert tokens_of(continued) == tokens_of(await collect(engines.prefill, request(tokens)))
    assert first_of(continued).external_tokens == 0


async def test_the_first_output_has_the_facts_and_the_last_one_the_end(engines: Pair) -> None:
    outputs = await collect(engines.decode, request(prompt(10), max_tokens=5))
    assert len(tokens_of(outputs)) == 5
    assert [output.finish for output in outputs] == [None] * (len(outputs) - 1) + [Finish("length")]
    first = first_of(outputs)
    assert first.cached_tokens == 0 and first.queue_s >= 0 and first.compute_s > 0


async def test_a_stop_token_ends_with_stop_and_is_named(engines: Pair) -> None:
    tokens = prompt(10)
    third = tokens_of(await collect(engines.decode, request(tokens)))[2]
    outputs = await collect(engines.decode, request(tokens, stop_token_ids=[third]))
    assert tokens_of(outputs)[-1] == third
    assert len(tokens_of(outputs)) <= 3
    assert outputs[-1].finish == Finish("stop", third)


async def test_a_prefill_whose_first_token_ends_it_holds_nothing(engines: Pair) -> None:
    tokens = prompt(40)
    first = tokens_of(await collect(engines.prefill, request(tokens, max_tokens=1)))[0]
    outputs = await collect(engines.prefill, request(tokens, Hold(lease_s=60.0), max_tokens=1, stop_token_ids=[first]))
    assert outputs[-1].handoff is None
    assert outputs[-1].finish is not None and outputs[-1].finish.reason == "stop"
    assert await settles(engines.prefill)


async def test_logprobs_come_in_columns_with_the_sampled_token_first(engines: Pair) -> None:
    outputs = await collect(engines.decode, request(prompt(10), max_tokens=4, logprobs=3))
    for output in outputs:
        assert output.logprobs is not None
        rows = len(output.token_ids)
        assert output.logprobs.width == 4
        assert len(output.logprobs.token_ids) == len(output.logprobs.logprobs) == rows * 4
        assert output.logprobs.token_ids[::4] == output.token_ids
        # Greedy: the sampled token is also the likeliest of the three columns that follow it.
        assert output.logprobs.ranks == [1] * rows
        assert output.logprobs.token_ids[1::4] == output.token_ids
        assert output.logprobs.logprobs[1] >= output.logprobs.logprobs[2] >= output.logprobs.logprobs[3]


async def test_prompt_logprobs_cover_every_prompt_token_but_the_first(engines: Pair) -> None:
    tokens = prompt(40)
    outputs = await collect(engines.prefill, request(tokens, max_tokens=2, prompt_logprobs=2))
    scored = outputs[0].prompt_logprobs
    assert scored is not None
    assert scored.width == 3
    assert scored.token_ids[::3] == tokens[1:]
    assert len(scored.ranks) == 39
    assert all(output.prompt_logprobs is None for output in outputs[1:])


async def test_an_engine_measures_its_steps(engines: Pair) -> None:
    await settles(engines.prefill)
    tokens = prompt(100)
    engines.prefill.take_steps()
    await collect(engines.prefill, request(tokens, max_tokens=4))
    assert await settles(engines.prefill)
    prefilled, *decoded = engines.prefill.take_steps()
    assert (prefilled.prefill_tokens, prefilled.prefill_pairs, prefilled.decode_requests) == (100, 5000, 0)
    assert [(step.prefill_tokens, step.decode_requests) for step in decoded[:3]] == [(0, 1)] * 3
    assert [step.decode_context_tokens for step in decoded[:3]] == [100, 101, 102]
    assert all(0 < step.duration_us < 1e7 for step in (prefilled, *decoded))
    assert engines.prefill.take_steps() == []
    # Of what it has already only the rest is computed.
    await collect(engines.prefill, request([*tokens, *prompt(20)], max_tokens=1))
    assert await settles(engines.prefill)
    (rest,) = engines.prefill.take_steps()
    assert (rest.prefill_tokens, rest.prefill_pairs) == (24, 24 * 96 + 288)


async def test_the_first_step_after_a_pull_is_one_of_a_sequence_that_decodes(engines: Pair) -> None:
    tokens = prompt(100)
    token, handoff = await prefill(engines.prefill, tokens)
    assert await settles(engines.decode)
    engines.decode.take_steps()
    await collect(engines.decode, request([*tokens, *token], TakeOver(handoff), max_tokens=2))
    assert await settles(engines.decode)
    steps = engines.decode.take_steps()
    assert [(step.prefill_tokens, step.decode_requests) for step in steps[:2]] == [(0, 1)] * 2
    assert [step.decode_context_tokens for step in steps[:2]] == [100, 101]


async def test_a_repeated_prompt_hits_the_prefix_cache(engines: Pair) -> None:
    tokens = prompt(100)
    await collect(engines.decode, request(tokens))
    again = await collect(engines.decode, request(tokens))
    assert first_of(again).cached_tokens == 96


async def test_requests_side_by_side_keep_their_own_tokens_in_order(engines: Pair) -> None:
    prompts = [prompt(20 + n) for n in range(8)]
    alone = [tokens_of(await collect(engines.decode, request(tokens))) for tokens in prompts]
    together = await asyncio.gather(*(collect(engines.decode, request(tokens)) for tokens in prompts))
    assert [tokens_of(outputs) for outputs in together] == alone


@pytest.mark.parametrize("transfer", [None, Hold(lease_s=60.0)], ids=["decodes", "is held"])
async def test_a_late_urgent_prompt_overtakes_those_that_wait_in_the_engine(
    engines: Pair, transfer: Hold | None
) -> None:
    engine = engines.prefill
    begun: list[str] = []
    first = asyncio.Event()

    async def run(name: str, priority: int) -> None:
        def take(output: EngineOutput) -> None:
            if output.first is not None:
                begun.append(name)
                first.set()
            outputs.append(output)

        outputs: list[EngineOutput] = []
        wanted = request(prompt(200), transfer, max_tokens=30 if transfer is None else 1)
        await engine.generate(msgspec.structs.replace(wanted, priority=priority), take)
        if outputs[-1].handoff is not None:
            await engine.release(outputs[-1].handoff.lease_id)

    async with asyncio.TaskGroup() as group:
        for number in range(40):
            group.create_task(run(f"batch {number}", 2**30))
        await first.wait()
        ahead = len(begun)
        group.create_task(run("late", -(2**30)))
    assert await settles(engine)
    # 16 run at once. Nothing that still waited when it came goes before it.
    assert ahead < 20
    assert begun.index("late") < 36


async def test_equal_priorities_are_taken_in_the_order_of_arrival(engines: Pair) -> None:
    begun: list[int] = []

    async def run(number: int) -> None:
        wanted = request(prompt(50), max_tokens=10)
        await engines.prefill.generate(wanted, lambda output: begun.append(number) if output.first else None)

    await asyncio.gather(*(run(number) for number in range(40)))
    # Of a step's outputs the order says nothing.
    assert all(abs(at - number) < 16 for at, number in enumerate(begun))


@pytest.mark.parametrize(
    ("tokens", "sampling"),
    [
        (list(range(3, 500)) * 3, {}),
        ([5, 6], {"max_tokens": 0}),
        ([5, 6], {"temperature": -1.0}),
        ([5, 6], {"n": 2}),
        ([5, 6], {"stop": ["word"]}),
        ([5, 99999], {}),
    ],
    ids=["too long", "no tokens wanted", "negative temperature", "two sequences", "stop string", "out of vocabulary"],
)
async def test_what_cannot_be_served_is_an_invalid_request(
    engines: Pair, tokens: list[int], sampling: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        await collect(engines.decode, request(tokens, **sampling))
    with pytest.raises(InvalidRequest):
        await collect(engines.decode, EngineRequest(request_id="bad", token_ids=tokens, sampling=b"\xc1"))
    await engines.decode.check_health()
    assert await settles(engines.decode)


# A fake engine compiles no grammar. The backend warns of how vLLM calls it.
@pytest.mark.filterwarnings("ignore:max_rollback_tokens is deprecated")
@pytest.mark.parametrize("engines", ["vllm"], indirect=True)
@pytest.mark.parametrize("max_tokens", [1, 8])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        # vLLM's checks know no vocabulary, and this token is in none.
        ("root ::= Token(99999999)", r"The grammar does not compile: .*99999999"),
        ('root ::= root "t5"', r"The grammar leads nowhere: it allows no token behind its first 0\."),
    ],
)
async def test_a_grammar_that_only_the_engine_core_can_refuse_is_invalid_in_words(
    engines: Pair, max_tokens: int, text: str, words: str
) -> None:
    grammar = {"grammar": text, "_backend": "xgrammar", "_backend_was_auto": True}
    with pytest.raises(InvalidRequest, match=words):
        await collect(engines.decode, request(prompt(10), structured_outputs=grammar, max_tokens=max_tokens))
    assert len(tokens_of(await collect(engines.decode, request(prompt(10))))) == 8
    assert await settles(engines.decode)


async def test_an_engine_answers_a_ping_between_steps_and_tells_of_every_step(
    engines: Pair,
) -> None:
    before = engines.decode.load().steps
    await engines.decode.ping()
    running = asyncio.create_task(collect(engines.decode, request(prompt(64), max_tokens=50)))
    await engines.decode.ping()
    assert len(tokens_of(await running)) == 50
    assert engines.decode.load().steps >= before + 50


# A fake engine has no process of its own; tests/worker/test_run.py lets one hang.
@pytest.mark.parametrize("engines", ["vllm"], indirect=True)
async def test_an_engine_core_that_stands_still_while_its_process_lives_answers_no_ping(engines: Pair) -> None:
    cores = multiprocessing.active_children()
    assert cores
    for core in cores:
        assert core.pid is not None
        os.kill(core.pid, signal.SIGSTOP)
    pings = [asyncio.create_task(engine.ping()) for engine in engines]
    try:
        done, _ = await asyncio.wait(pings, timeout=0.5)
        assert not done
        await engines.decode.check_health()
    finally:
        for core in cores:
            assert core.pid is not None
            os.kill(core.pid, signal.SIGCONT)
    async with asyncio.timeout(SETTLE_S):
        await asyncio.gather(*pings)


async def test_an_engine_may_compute_on_every_core(engines: Pair) -> None:
    assert engines.prefill is not engines.decode
    for child in multiprocessing.active_children():
        assert child.pid is not None
        for thread in psutil.Process(child.pid).threads():
            assert os.sched_getaffinity(thread.id) == os.sched_getaffinity(0)
