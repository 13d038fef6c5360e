"""What a holder says of the KV it held, and that strangers cannot stop it from saying it."""

from __future__ import annotations

import msgspec
import pytest

from kv_transfer.integrity import held_kv_registry
from kv_transfer.integrity.held_kv_registry import HandshakeResponder, HeldKvRegistry, is_checked, question
from kv_transfer.integrity.transfer_proof import HolderReply


def book(*request_ids: str) -> HeldKvRegistry:
    made = HeldKvRegistry("p0-1", "kind")
    for request_id in request_ids:
        made.hold(request_id)
        made.learn(request_id, 0, b"12345678")
    return made


def test_it_tells_held_pulled_and_ended_apart_and_keeps_the_sums() -> None:
    made = book("a", "b", "c")
    made.end("b", pulled=True)
    made.end("c", pulled=False)
    told = [made.reply(name, 0) for name in "abcd"]
    assert [answer.lease for answer in told] == ["held", "pulled", "ended", "unknown"]
    assert [answer.checksums for answer in told] == [b"12345678"] * 3 + [b""]
    assert all(answer.engine_id == "p0-1" for answer in told)


def test_ranks_have_their_own_sums_and_none_has_no_kind() -> None:
    made = book("a")
    made.learn("a", 1, b"87654321")
    made.learn("never held", 1, b"87654321")
    assert made.reply("a", 1) == HolderReply(
        engine_id="p0-1", request_id="a", lease="held", checksum_kind="kind", checksums=b"87654321"
    )
    assert (made.reply("a", 2).checksum_kind, made.reply("never held", 1).lease) == ("", "unknown")


def test_what_ended_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_kv_registry, "_ENDED_MAX", 3)
    names = [f"r{number}" for number in range(10)]
    made = book(*names)
    for name in names:
        made.end(name, pulled=True)
        made.end(name, pulled=False)
    assert [name for name in names if made.reply(name, 0).lease != "unknown"] == names[-3:]
    monkeypatch.setattr(held_kv_registry, "_ENDED_CHECKSUM_BYTES_MAX", 16)
    made.hold("last")
    made.learn("last", 0, bytes(16))
    made.end("last", pulled=True)
    assert [name for name in [*names, "last"] if made.reply(name, 0).lease != "unknown"] == ["last"]


def test_questions_are_answered_beside_handshakes() -> None:
    answers = HandshakeResponder({(0, 0): b"metadata"}, book("a"))
    message, about, rank = msgspec.msgpack.decode(question(b"get_meta", "a", 0))
    assert message == b"get_meta"
    assert msgspec.msgpack.decode(answers[about, rank], type=HolderReply).lease == "held"
    assert answers[0, 0] == b"metadata"


@pytest.mark.parametrize("key", [(7, 7), ("stranger", 0), ("baton_proof:a", "no rank"), (None, None)])
def test_a_strangers_question_is_answered_with_nothing_and_ends_no_thread(key: tuple[object, object]) -> None:
    assert HandshakeResponder({}, book("a"))[key] == b""


def test_the_checked_share_is_the_share_asked_for_and_the_same_leases_each_time() -> None:
    names = [f"r{number}" for number in range(4000)]
    chosen = [name for name in names if is_checked(name, 0.25)]
    assert 850 < len(chosen) < 1150
    assert chosen == [name for name in names if is_checked(name, 0.25)]
    assert not any(is_checked(name, 0.0) for name in names)
    assert all(is_checked(name, 1.0) for name in names)
