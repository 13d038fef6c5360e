"""A table is good from the moment of the question, however late the answer comes."""

from __future__ import annotations

import msgspec

from accounts.key_table import Key
from front_proxy.planning.key_watch import KeyWatch

KEYS = msgspec.msgpack.encode([Key(key_id="k1", digest=b"d", team="a")])


def watch() -> KeyWatch:
    return KeyWatch(pepper=b"", max_age_s=10.0)


def test_without_an_answer_it_is_good_for_nothing() -> None:
    one = watch()
    assert one.ask(0.0) == (0, 1)
    assert not one.good(0.0)


def test_an_answer_counts_from_its_question() -> None:
    one = watch()
    _, number = one.ask(0.0)
    assert one.hear(3, number, KEYS), "the scheduler must hear that it is here"
    assert one.good(9.9) and not one.good(10.0)
    _, late = one.ask(5.0)
    one.ask(9.0)
    assert not one.hear(3, late, b"")
    assert one.good(14.9) and not one.good(15.0)


def test_a_table_that_was_not_asked_for_makes_nothing_younger() -> None:
    one = watch()
    assert one.hear(4, 0, KEYS)
    assert one.table.version == 4 and not one.good(0.0)


def test_an_older_table_is_not_used_and_a_newer_one_that_is_missing_is_asked_for() -> None:
    one = watch()
    _, number = one.ask(0.0)
    one.hear(4, number, KEYS)
    _, number = one.ask(1.0)
    assert one.hear(3, number, KEYS) and one.table.version == 4
    _, number = one.ask(2.0)
    assert one.hear(5, number, b""), "the keys of version 5 did not come"
    assert one.good(9.9) and not one.good(10.0)
