"""Fingerprints and what makes two layouts compatible."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.handoff.layout import fingerprint, incompatible

PARTS = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=5)


@given(PARTS, PARTS)
def test_fingerprints_are_equal_exactly_when_the_parts_are(a: dict[str, str], b: dict[str, str]) -> None:
    assert (fingerprint(a) == fingerprint(b)) is (a == b)


def test_the_order_of_parts_does_not_matter() -> None:
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})


def test_an_empty_fingerprint_matches_nothing_not_even_itself() -> None:
    assert incompatible("f", "f") is None
    assert "none here, none there" in (incompatible("", "") or "")
