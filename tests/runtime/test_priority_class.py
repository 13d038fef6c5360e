"""Classes, priority numbers, and the one number that engines order by."""

from __future__ import annotations

import pytest

from runtime.priority_class import PriorityClass, engine_priority

CLASSES = [one.value for one in PriorityClass]
NUMBERS = [-(2**31), -(2**29), -7, 0, 7, 2**29, 2**31 - 1]


def test_engines_order_by_class_and_then_by_the_requests_own_number() -> None:
    ordered = [(name, number) for name in CLASSES for number in (-7, 0, 7)]
    numbers = [engine_priority(name, number) for name, number in ordered]
    assert numbers == sorted(set(numbers))


def test_no_number_reaches_into_another_class_or_beyond_32_bits() -> None:
    spans = [[engine_priority(name, number) for number in NUMBERS] for name in CLASSES]
    assert all(span == sorted(span) for span in spans)
    assert max(spans[0]) < min(spans[1]) and max(spans[1]) < min(spans[2])
    assert min(spans[0]) >= -(2**31) and max(spans[2]) < 2**31


@pytest.mark.parametrize(("number", "name"), [(-1, "interactive"), (0, "default"), (1, "batch")])
def test_without_a_class_the_number_says_it(number: int, name: str) -> None:
    assert engine_priority("", number) == engine_priority("urgent", number) == engine_priority(name, number)
    assert engine_priority("", 0) == 0
