"""What waits for the reader of one GenerateMany stream, in order, as the messages in which it will be sent."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable

from front_proxy.dispatch.attempts import Lane
from protos.inference.v1 import inference_pb2
from runtime.failures import Failure, FailureError, FailureKind

BATCH_BYTES_MAX = 1 << 20
"""Aim for one message: many clients accept no more than gRPC's own 4 MiB. A single response may be longer."""
FRAME_BYTES = 16
"""More than the tag and the length that a message costs inside of another one."""
KNOWN_TOKENS_MAX = 1 << 15
"""Those that came last. Of others the encoding is made anew."""
_TOKEN_BYTES_MAX = 5
_CHARACTER_BYTES_MAX = 4


class _Batch:
    __slots__ = ("bytes", "count", "encoded", "message")

    def __init__(self) -> None:
        self.message = inference_pb2.GenerateManyResponse(takes_lists=True)
        self.encoded: list[bytes] = []
        """Outputs behind those in ``message``, as they go over the wire."""
        self.bytes = 0
        self.count = 0

    def whole(self) -> inference_pb2.GenerateManyResponse:
        """The message with all that is here."""
        if self.encoded:
            self.message.MergeFromString(b"".join(self.encoded))
            self.encoded = []
        return self.message


class OutputQueue:
    """``count_max`` items and ``bytes_max`` bytes and an item may wait; refusals and aborts, all short, add to it."""

    def __init__(self, *, count_max: int, bytes_max: int, message_bytes_max: int) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._message_bytes_max = message_bytes_max
        self._batch_bytes_max = min(BATCH_BYTES_MAX, message_bytes_max)
        self._batches: deque[_Batch] = deque()
        self._count = 0
        self._bytes = 0
        self._room = asyncio.Event()

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether nothing more should be added."""
        return self._count >= self._count_max or self._bytes >= self._bytes_max

    async def until_room(self) -> None:
        """Wait until one more may be added; what is added before the next await finds that room."""
        while self.full:
            self._room.clear()
            await self._room.wait()

    def add(self, item: inference_pb2.GenerateResponse | inference_pb2.RequestError) -> None:
        """Append it. Raises FailureError (TOO_LARGE) for what no message can carry: the stream would end with it."""
        size = item.ByteSize() + FRAME_BYTES
        if size > self._message_bytes_max:
            message = (
                f"The output has {size} bytes; a message of this front proxy has at most {self._message_bytes_max}: "
                "ask for less at once (fewer log probabilities, stream)."
            )
            raise FailureError(Failure(kind=FailureKind.TOO_LARGE, message=message))
        batch = self._batch_for(size).whole()
        if isinstance(item, inference_pb2.RequestError):
            batch.errors.append(item)
        else:
            batch.outputs.append(item)

    def add_tokens(self, request_id: str, text: str, token_ids: list[int]) -> None:
        """Append a response of the middle of a request's only choice. It is written where it lies."""
        characters = len(request_id) + len(text)
        size = 2 * FRAME_BYTES + _CHARACTER_BYTES_MAX * characters + _TOKEN_BYTES_MAX * len(token_ids)
        response = self._batch_for(size).whole().outputs.add()
        response.request_id = request_id
        choice = response.choices.add()
        choice.token_ids.extend(token_ids)
        if text:
            choice.text = text

    def add_encoded(self, output: bytes) -> None:
        """Append a response as ``outputs`` of a message has it."""
        self._batch_for(len(output)).encoded.append(output)

    def _batch_for(self, size: int) -> _Batch:
        """What takes one more item of so many bytes."""
        batch = self._batches[-1] if self._batches else None
        if batch is None or batch.bytes + size > self._batch_bytes_max:
            batch = _Batch()
            self._batches.append(batch)
        batch.bytes += size
        batch.count += 1
        self._bytes += size
        self._count += 1
        return batch

    def take(self) -> inference_pb2.GenerateManyResponse:
        """The oldest, as many as fit into one message; at least one of those that wait."""
        batch = self._batches.popleft()
        self._bytes -= batch.bytes
        self._count -= batch.count
        self._room.set()
        return batch.whole()


class TokenOutlet:
    """Where the middle of one request's only choice goes without waking a task."""

    def __init__(
        self, queue: OutputQueue, request: inference_pb2.GenerateRequest, changed: Callable[[], object]
    ) -> None:
        self._tokens = 0
        self._queue = queue
        self._request_id = request.request_id
        self._with_text = wants_text(request)
        self._changed = changed
        self._lane: _TokenLane | None = None

    @property
    def tokens(self) -> int:
        """Written here."""
        return self._tokens + (0 if self._lane is None else self._lane.tokens)

    @property
    def open(self) -> bool:
        """Whether there is room."""
        return not self._queue.full

    def write(self, text: str, token_ids: list[int]) -> bool:
        """Queue what some tokens add to the output."""
        self._tokens += len(token_ids)
        self._queue.add_tokens(self._request_id, text if self._with_text else "", token_ids)
        self._changed()
        return True

    def lane(self, delivered: list[int]) -> Lane | None:
        """A shorter way for single tokens without text; they are added to ``delivered``."""
        if self._with_text:
            return None
        if self._lane is None:
            self._lane = _TokenLane(self._queue, self._request_id, delivered, self._changed)
        return self._lane.take


class _TokenLane:
    """Of one request. It meets few objects for each token, see AttemptWords."""

    __slots__ = ("_changed", "_delivered", "_head", "_queue", "_request_id", "_size", "tokens")

    def __init__(
        self, queue: OutputQueue, request_id: str, delivered: list[int], changed: Callable[[], object]
    ) -> None:
        self.tokens = 0
        self._queue = queue
        self._request_id = request_id
        self._delivered = delivered
        self._changed = changed
        self._size = 0
        self._head = b""

    def take(self, token_ids: list[int]) -> bool:
        """Queue one token."""
        queue = self._queue
        if len(token_ids) != 1 or queue.full:
            return False
        (token_id,) = token_ids
        token = varint(token_id)
        if len(token) != self._size:
            self._resize(len(token))
        self._delivered.append(token_id)
        self.tokens += 1
        queue.add_encoded(self._head + token)
        self._changed()
        return True

    def _resize(self, size: int) -> None:
        """Make what comes before a token of so many bytes, in a message with one response that ends with it."""
        response = inference_pb2.GenerateResponse(request_id=self._request_id)
        response.choices.add().token_ids.append(max(1, 1 << 7 * (size - 1)))
        self._head = inference_pb2.GenerateManyResponse(outputs=[response]).SerializeToString()[:-size]
        self._size = size


@functools.lru_cache(maxsize=KNOWN_TOKENS_MAX)
def varint(number: int) -> bytes:
    """As protobuf writes it."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def wants_text(request: inference_pb2.GenerateRequest) -> bool:
    """Whether its answer has text."""
    return request.return_text or not request.HasField("return_text")
