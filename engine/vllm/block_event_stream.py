"""Receives vLLM's KV events from its engine process, and asks it to repeat lost ones. Keeps no block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import zmq

from engine.protocol import BlockListener
from engine.vllm.args import EventAddresses
from engine.vllm.kv_events import decode

READ_INTERVAL_S = 0.1
"""Batches of so much time are read together, since a turn of the event loop costs more than reading one. The worker
reports no oftener (``load_interval_s``)."""
READ_MAX = 16
"""Batches that are read in one turn of the event loop; one of 8,000 tokens takes 1 ms."""
_SEQ_BYTES = 8
_END = (-1).to_bytes(_SEQ_BYTES, "big", signed=True)


class BlockEventStream:
    """Passes all batches to a listener until ``close``. Construct it inside the running loop."""

    def __init__(self, addresses: EventAddresses, listener: BlockListener) -> None:
        self._listener = listener
        self._context = zmq.Context()
        subscription = self._context.socket(zmq.SUB)
        subscription.subscribe(b"")
        subscription.connect(addresses.batches)
        self._replays = self._context.socket(zmq.DEALER)
        self._replays.connect(addresses.replay)
        self._readers = (_Reader(subscription, self._on_batch), _Reader(self._replays, self._on_repeated))
        self._asked = False

    def close(self) -> None:
        """Stop listening."""
        for reader in self._readers:
            reader.close()
        self._context.term()

    def _on_batch(self, frames: list[bytes]) -> None:
        _, seq, payload = frames
        self._listener.batch(int.from_bytes(seq, "big"), decode(payload))
        first = self._listener.replay_from
        if first is None:
            self._asked = False
        elif not self._asked:
            self._asked = True
            self._replays.send_multipart([b"", first.to_bytes(_SEQ_BYTES, "big")], zmq.DONTWAIT)

    def _on_repeated(self, frames: list[bytes]) -> None:
        _, _, seq, payload = frames
        if seq != _END:
            self._listener.batch(int.from_bytes(seq, "big"), decode(payload))
            return
        self._asked = False
        self._listener.replay_ended()


class _Reader:
    """Calls back with the frames of each message of a socket, a moment after it came."""

    def __init__(self, socket: zmq.Socket[bytes], on_message: Callable[[list[Any]], None]) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._fd: int = socket.fileno()
        self._timer: asyncio.TimerHandle | None = None
        self._wait()

    def close(self) -> None:
        """Stop watching, before the descriptor can become another's."""
        self._loop.remove_reader(self._fd)
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close(linger=0)

    def _wait(self) -> None:
        self._loop.add_reader(self._fd, self._read_soon)

    def _read_soon(self) -> None:
        self._loop.remove_reader(self._fd)
        self._timer = self._loop.call_later(READ_INTERVAL_S, self._read)

    def _read(self) -> None:
        for count in range(READ_MAX):
            try:
                frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                if count:
                    # A step follows a step: the descriptor would only add a turn of the loop.
                    self._timer = self._loop.call_later(READ_INTERVAL_S, self._read)
                else:
                    # Only now will the descriptor tell of the next message.
                    self._wait()
                return
            self._on_message(frames)
        self._timer = self._loop.call_later(0, self._read)
