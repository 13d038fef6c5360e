"""The system clock."""

from __future__ import annotations

from runtime.timing.clock import Clock, SystemClock


def test_the_system_clock_never_goes_back() -> None:
    clock: Clock = SystemClock()
    readings = [clock.monotonic_s() for _ in range(100)]
    assert readings == sorted(readings)
