"""A peer is silent after several looks without a word, however long the one who looks was away."""

from __future__ import annotations

from runtime.silence import LOOKS, Silence, look_interval_s


def test_a_peer_is_silent_after_whole_intervals_without_a_word() -> None:
    silence = Silence()
    assert [silence.look() for _ in range(LOOKS + 1)] == [False] * LOOKS + [True]
    silence.heard()
    assert [silence.look() for _ in range(LOOKS)] == [False] * LOOKS
    silence.heard()
    assert not silence.look()


def test_nobody_is_looked_at_more_often_than_he_promised_to_speak() -> None:
    assert look_interval_s(3.0, 0.5) == 1.0
    assert look_interval_s(3.0, 2.0) == 2.0
