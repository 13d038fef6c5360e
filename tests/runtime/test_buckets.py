"""Histogram bounds are usable as they stand."""

from __future__ import annotations

import pytest

from runtime import buckets


@pytest.mark.parametrize("name", [name for name in vars(buckets) if name.isupper()])
def test_bounds_rise_and_are_few(name: str) -> None:
    bounds = getattr(buckets, name)
    assert list(bounds) == sorted(set(bounds))
    assert 5 <= len(bounds) <= 25
