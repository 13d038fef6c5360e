"""Of requests that come at once, a few begin in each turn of the event loop, in order."""

from __future__ import annotations

import asyncio

from front_proxy.gateway.turns import Turns


async def test_a_few_begin_in_each_turn_in_order() -> None:
    turns, begun, turn = Turns(3), list[tuple[int, int]](), 0

    async def one(number: int) -> None:
        await turns.begin()
        begun.append((number, turn))

    tasks = [asyncio.create_task(one(number)) for number in range(10)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turn += 1
    assert [number for number, _ in begun] == list(range(10))
    counts = [sum(at == each for _, at in begun) for each in range(turn + 1)]
    assert max(counts) == 3


async def test_one_that_left_takes_no_place() -> None:
    turns, begun = Turns(1), list[int]()

    async def one(number: int) -> None:
        await turns.begin()
        begun.append(number)

    tasks = [asyncio.create_task(one(number)) for number in range(4)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert begun == [0, 2, 3]
    # What comes later begins at once.
    await asyncio.wait_for(turns.begin(), 1.0)
