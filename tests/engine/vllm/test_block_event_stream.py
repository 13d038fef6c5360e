"""Batches of a publisher's socket reach the listener, in swarms and after pauses, and lost ones are asked for again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from engine.vllm.args import EventAddresses
from engine.vllm.block_event_stream import READ_MAX, BlockEventStream
from kv_transfer.prefix.events import EngineEvent
from tests.support.polling import until

WAIT_S = 10.0
END = (-1).to_bytes(8, "big", signed=True)


class Listener:
    def __init__(self) -> None:
        self.batches: list[int] = []
        self.replay_from: int | None = None
        self.replays = 0

    def batch(self, seq: int, events: Sequence[EngineEvent] | None) -> None:
        assert events is not None
        self.batches.append(seq)
        if self.replay_from == seq:
            self.replay_from = None

    def told(self, events: Sequence[EngineEvent]) -> None:
        raise AssertionError(events)

    def replay_ended(self) -> None:
        self.replays += 1

    async def has(self, count: int) -> None:
        await until(lambda: len(self.batches) >= count, within_s=WAIT_S)


class Publisher:
    """As vLLM's: batches on one socket, those of before on the other."""

    def __init__(self, folder: Path) -> None:
        self.addresses = EventAddresses(batches=f"ipc://{folder}/batches", replay=f"ipc://{folder}/replay")
        self._context = zmq.asyncio.Context()
        self._batches, self.replay = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        self._batches.bind(self.addresses.batches)
        self.replay.bind(self.addresses.replay)

    async def subscribed(self) -> None:
        assert await asyncio.wait_for(self._batches.recv(), WAIT_S) == b"\x01"

    async def publish(self, *seqs: int) -> None:
        for seq in seqs:
            await self._batches.send_multipart([b"", seq.to_bytes(8, "big"), payload()])

    def close(self) -> None:
        self._context.destroy(linger=0)


def payload() -> bytes:
    return msgspec.msgpack.encode([0.0, [{"type": "AllBlocksCleared"}]])


@pytest_asyncio.fixture
async def publisher(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Publisher]:
    made = Publisher(tmp_path_factory.mktemp("k"))
    yield made
    made.close()


@pytest.mark.asyncio
async def test_batches_come_in_swarms_and_after_pauses(publisher: Publisher) -> None:
    listener = Listener()
    stream = BlockEventStream(publisher.addresses, listener)
    await publisher.subscribed()
    sent = 0
    for swarm in (1, 3 * READ_MAX + 1, 1, 2 * READ_MAX, 1):
        await publisher.publish(*range(sent, sent + swarm))
        sent += swarm
        await listener.has(sent)
    stream.close()
    assert listener.batches == list(range(sent))


@pytest.mark.asyncio
async def test_what_is_missing_is_asked_for_once(publisher: Publisher) -> None:
    listener = Listener()
    stream = BlockEventStream(publisher.addresses, listener)
    await publisher.subscribed()
    listener.replay_from = 3
    await publisher.publish(4, 5)
    peer, _, first = await asyncio.wait_for(publisher.replay.recv_multipart(), WAIT_S)
    assert int.from_bytes(first, "big") == 3
    for seq, data in ((3).to_bytes(8, "big"), payload()), (END, b""):
        await publisher.replay.send_multipart([peer, b"", b"", seq, data])
    await listener.has(3)
    stream.close()
    assert sorted(listener.batches) == [3, 4, 5]
