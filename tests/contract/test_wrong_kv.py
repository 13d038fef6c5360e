"""Wrong KV never becomes an answer: real engines, real NIXL, and KV that is spoilt under them."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest

from engine.protocol import Engine, EngineOutput, Hold, TakeOver
from kv_transfer.handoff.handoff import KvHandoff
from tests.contract.conftest import Pair
from tests.contract.test_engine_contract import prompt, settles
from tests.support.engines import collect, first_of, request, tokens_of
from tests.support.polling import until

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.parametrize("engines", ["vllm"], indirect=True),
]

SETTLE_S = 5.0


async def hold(engine: Engine, tokens: list[int], lease_id: str) -> KvHandoff:
    wanted = request(tokens, Hold(lease_s=60.0), max_tokens=1)
    outputs = await collect(engine, msgspec.structs.replace(wanted, request_id=lease_id))
    assert outputs[-1].handoff is not None
    # What is done to held KV is done in the engine's next step: make sure that there was one.
    await collect(engine, request(prompt(1), max_tokens=2))
    return outputs[-1].handoff


async def take_over(engines: Pair, handoff: KvHandoff, tokens: list[int]) -> tuple[list[EngineOutput], dict[str, int]]:
    """What decode made of it, and what was counted."""
    before = engines.decode.load()
    outputs = await collect(engines.decode, request(tokens, TakeOver(handoff)))
    names = ("pulls_checked", "pulls_attested", "pulls_wrong", "pulls_unproved", "pull_failures")

    def counted() -> dict[str, int]:
        after = engines.decode.load()
        counts = {name: getattr(after, name) - getattr(before, name) for name in names}
        return {name: count for name, count in counts.items() if count}

    with contextlib.suppress(TimeoutError):
        await until(counted, within_s=SETTLE_S)
    return outputs, counted()


async def alone(engines: Pair, tokens: list[int]) -> list[int]:
    """What one engine answers, that never saw the spoilt blocks: its own prefix cache is another salt's."""
    wanted = request(tokens)
    fresh = msgspec.structs.replace(wanted, cache_salt=f"alone-{wanted.request_id}")
    return tokens_of(await collect(engines.decode, fresh))


@pytest.mark.parametrize("length", [1, 32, 100])
async def test_a_sound_pull_is_proved_by_content_and_one_that_is_not_checked_by_word(
    engines: Pair, length: int
) -> None:
    for kind, counter in (("checked", "pulls_checked"), ("unchecked", "pulls_attested")):
        tokens = prompt(length)
        handoff = await hold(engines.prefill, tokens, f"{kind}-{length}")
        outputs, counted = await take_over(engines, handoff, [*tokens, 7])
        assert counted == {counter: 1}
        assert first_of(outputs).external_tokens == length
        assert tokens_of(outputs) == await alone(engines, [*tokens, 7])


@pytest.mark.parametrize("how", ["flip", "negate"])
async def test_spoilt_kv_is_found_out_and_computed_again(engines: Pair, how: str) -> None:
    tokens = prompt(100)
    outputs, counted = await take_over(engines, await hold(engines.prefill, tokens, f"{how}-1"), tokens)
    assert counted == {"pulls_wrong": 1}
    assert tokens_of(outputs) == await alone(engines, tokens)
    assert first_of(outputs).external_tokens == 0
    # Nor does it stay behind: a later request finds the recomputed blocks in the prefix cache, not the spoilt ones.
    again = await collect(engines.decode, request(tokens))
    assert tokens_of(again) == tokens_of(outputs)


async def test_without_the_check_the_same_spoilt_kv_is_served(engines: Pair) -> None:
    """Shows that the tests above can fail."""
    tokens = prompt(100)
    outputs, counted = await take_over(engines, await hold(engines.prefill, tokens, "unchecked-negate"), tokens)
    assert counted == {"pulls_attested": 1}
    assert tokens_of(outputs) != await alone(engines, tokens)


@pytest.mark.parametrize(("kind", "counter"), [("checked", "pulls_wrong"), ("unchecked", "pulls_unproved")])
async def test_blocks_read_after_their_lease_ended_are_not_used(engines: Pair, kind: str, counter: str) -> None:
    tokens = prompt(100)
    handoff = await hold(engines.prefill, tokens, f"{kind}-reuse")
    await engines.prefill.release(handoff.lease_id)
    assert await settles(engines.prefill)
    outputs, counted = await take_over(engines, handoff, tokens)
    assert counted == {counter: 1}
    assert tokens_of(outputs) == await alone(engines, tokens)


async def test_a_hand_off_of_an_earlier_incarnation_reads_nothing_from_the_engine_on_its_port(engines: Pair) -> None:
    tokens = prompt(100)
    handoff = await hold(engines.prefill, tokens, "epoch")
    params: dict[str, Any] = msgspec.msgpack.decode(handoff.connector_params)
    assert params["remote_engine_id"] == f"p0-{engines.prefill.info.epoch}"
    params["remote_engine_id"] = f"p0-{engines.prefill.info.epoch - 1}"
    stale = msgspec.structs.replace(handoff, connector_params=msgspec.msgpack.encode(params))
    bytes_in = engines.decode.load().kv_bytes_in
    outputs, counted = await take_over(engines, stale, tokens)
    # One or two: a heartbeat of vLLM's connector may try the same handshake once more.
    assert counted.keys() == {"pull_failures"}
    assert engines.decode.load().kv_bytes_in == bytes_in
    assert tokens_of(outputs) == await alone(engines, tokens)
    await engines.prefill.release(handoff.lease_id)


async def test_a_renewed_lease_outlives_its_first_end_in_the_engine(engines: Pair) -> None:
    tokens = prompt(100)
    wanted = request(tokens, Hold(lease_s=1.0), max_tokens=1)
    outputs = await collect(engines.prefill, wanted)
    handoff = outputs[-1].handoff
    assert handoff is not None
    expired = engines.prefill.load().leases_expired
    await engines.prefill.renew(handoff.lease_id, 60.0)
    other = (await collect(engines.prefill, request(prompt(100), Hold(lease_s=1.5), max_tokens=1)))[-1].handoff
    assert other is not None
    await until(lambda: engines.prefill.load().leases_expired > expired, within_s=SETTLE_S)
    # The one that was not renewed, and that began later, has run out.
    assert engines.prefill.load().leases_expired == expired + 1
    outputs, counted = await take_over(engines, handoff, tokens)
    assert counted == {"pulls_checked": 1}
    assert await settles(engines.prefill)
