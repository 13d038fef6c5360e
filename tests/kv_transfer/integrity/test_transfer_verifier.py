"""Proofs carried out over a scripted side channel. Over a real one: tests/contract/test_wrong_kv.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

zmq = pytest.importorskip("zmq")

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


def holder(request_id: str = "r") -> Holder:
    return Holder(host="h", port=1, engine_id="p0-1", request_id=request_id, rank=0)


def verifier(script: Script, ours: bytes = HELD) -> TransferVerifier:
    def checksums_of(block_ids: Sequence[int]) -> Any:
        return Ready(ours[-8 * len(block_ids) :])

    made = TransferVerifier(
        channel=cast(SideChannel, script), timeout_s=2.0, checksums_of=checksums_of, clock=script.clock
    )
    made.checksum_kind = "kind"
    return made


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
    assert proofs.verdicts() == {}
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
