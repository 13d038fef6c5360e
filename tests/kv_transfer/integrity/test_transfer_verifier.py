"""Proofs carried out: over a real side channel, and with a scripted one where time matters."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import msgspec
import pytest

zmq = pytest.importorskip("zmq")

from kv_transfer.integrity.held_kv_registry import HandshakeResponder, HeldKvRegistry, question  # noqa: E402
from kv_transfer.integrity.transfer_proof import HolderReply, TransferVerdict  # noqa: E402
from kv_transfer.integrity.transfer_verifier import Holder, SideChannel, TransferVerifier  # noqa: E402

WAIT_S = 10.0
HELD = b"aaaaaaaabbbbbbbbcccccccc"


class Ready:
    def __init__(self, checksums: bytes) -> None:
        self._checksums = checksums

    def ready(self) -> bytes | None:
        return self._checksums


class Script:
    """A channel on which the test speaks."""

    def __init__(self) -> None:
        self.asked: list[Holder] = []
        self.given_up: list[Holder] = []
        self.coming: list[HolderReply] = []
        self.now_s = 100.0

    def ask(self, holder: Holder) -> None:
        self.asked.append(holder)

    def replies(self) -> Iterator[tuple[str, int, HolderReply]]:
        coming, self.coming = self.coming, []
        for answer in coming:
            yield "h", 1, answer

    def give_up(self, holder: Holder) -> None:
        self.given_up.append(holder)

    def close(self) -> None:
        self.asked.clear()

    def clock(self) -> float:
        return self.now_s


def holder(request_id: str = "r", port: int = 1) -> Holder:
    return Holder(host="h" if port == 1 else "127.0.0.1", port=port, engine_id="p0-1", request_id=request_id, rank=0)


def verifier(script: Script, ours: bytes = HELD) -> TransferVerifier:
    def checksums_of(block_ids: Sequence[int]) -> Any:
        return Ready(ours[-8 * len(block_ids) :])

    return TransferVerifier(
        channel=cast(SideChannel, script),
        timeout_s=2.0,
        checksums_of=checksums_of,
        checksum_kind="kind",
        clock=script.clock,
    )


def told(request_id: str = "r", checksums: bytes = HELD) -> HolderReply:
    return HolderReply(engine_id="p0-1", request_id=request_id, lease="held", checksum_kind="kind", checksums=checksums)


def test_a_whole_pull_and_one_behind_a_cached_prefix_are_checked() -> None:
    script = Script()
    proofs = verifier(script)
    proofs.begin("whole", holder("a"), [4, 5, 6])
    proofs.begin("tail", holder("b"), [9])
    script.coming = [told("b"), told("a")]
    assert proofs.verdicts() == {}
    proofs.read_done("whole")
    proofs.read_done("tail")
    assert proofs.verdicts() == {"whole": (TransferVerdict.CHECKED, [4, 5, 6]), "tail": (TransferVerdict.CHECKED, [9])}
    assert len(proofs) == 0
    assert len(script.asked) == 2


@pytest.mark.parametrize("ours", [b"aaaaaaaabbbbbbbbccccccc!", b"!" + HELD[1:]])
def test_one_wrong_block_makes_the_pull_wrong(ours: bytes) -> None:
    script = Script()
    proofs = verifier(script, ours)
    proofs.begin("d", holder(), [1, 2, 3])
    proofs.read_done("d")
    script.coming = [told()]
    assert proofs.verdicts() == {"d": (TransferVerdict.WRONG, [1, 2, 3])}


def test_a_holder_that_does_not_answer_is_given_up_twice_and_then_the_pull_is_unproved() -> None:
    script = Script()
    proofs = verifier(script)
    proofs.begin("d", holder(), [1])
    proofs.read_done("d")
    assert proofs.verdicts() == {}
    script.now_s += 2.0
    # The first question was asked before the read was over: once more.
    assert proofs.verdicts() == {}
    assert len(script.asked) == 2
    script.now_s += 2.0
    assert proofs.verdicts() == {"d": (TransferVerdict.UNPROVED, [1])}
    assert script.given_up == [holder(), holder()]


def test_a_read_that_failed_needs_no_proof() -> None:
    script = Script()
    proofs = verifier(script)
    proofs.begin("d", holder(), [1])
    proofs.drop("d")
    proofs.drop("d")
    script.coming = [told()]
    assert proofs.verdicts() == {}


class Listener:
    """A side channel as vLLM's listener serves it."""

    def __init__(self, book: HeldKvRegistry) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._answers = HandshakeResponder({}, book)
        self._thread = threading.Thread(target=self._serve)
        self._stop = threading.Event()
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(20):
                identity, _, message = self._socket.recv_multipart()
                _, about, rank = msgspec.msgpack.decode(message)
                self._socket.send_multipart((identity, b"", self._answers[about, rank], msgspec.msgpack.encode(1.0)))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(WAIT_S)
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
def channel() -> Iterator[SideChannel]:
    made = SideChannel(lambda request_id, rank: question(b"get_meta", request_id, rank))
    yield made
    made.close()


def next_reply(channel: SideChannel) -> HolderReply:
    waiting = threading.Event()
    for _ in range(int(WAIT_S * 1000)):
        for _, _, answer in channel.replies():
            return answer
        waiting.wait(0.001)
    raise AssertionError("no reply came")


def test_holders_answer_over_the_side_channel(channel: SideChannel) -> None:
    book = HeldKvRegistry("p0-1", "kind")
    book.hold("r")
    book.learn("r", 0, HELD)
    listener = Listener(book)
    try:
        channel.ask(holder("r", listener.port))
        assert next_reply(channel) == told()
        book.end("r", pulled=False)
        channel.ask(holder("r", listener.port))
        assert next_reply(channel).lease == "ended"
        channel.give_up(holder("r", listener.port))
        channel.ask(holder("s", listener.port))
        assert next_reply(channel).lease == "unknown"
    finally:
        listener.close()
