"""Whether the usage records of a cluster are what its clients saw. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec


class UsageFound(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded. ``wrong``: what of it does not fit; empty: nothing."""

    records: int
    estimated: int
    wrong: list[str]


def compare(records: Sequence[Mapping[str, Any]], seen: Mapping[tuple[int, int], int], *, broken: int) -> UsageFound:
    """Records, as `baton usage export` tells them, beside the usage of all whole answers.

    Without a front proxy that died they are the same. One that died takes records with it that were not written, and
    leaves estimates for them. ``broken``: requests whose connection broke; each may have a record of what was shown.
    """
    estimated = [each for each in records if each["estimated"]]
    told = Counter(
        (each["prompt_tokens"], each["output_tokens"])
        for each in records
        if not each["estimated"] and each["prompt_tokens"]
    )
    wrong = []
    if len({str(each["uid"]) for each in records}) != len(records):
        wrong.append("a request has two records")
    if (missing := Counter(seen) - told).total() > len(estimated):
        some = list(missing.items())[:5]
        wrong.append(f"{missing.total()} answers have no record, with {len(estimated)} estimates: {some}")
    if (extra := told - Counter(seen)).total() > broken:
        some = list(extra.items())[:5]
        wrong.append(f"{extra.total()} records are of no answer, with {broken} broken connections: {some}")
    return UsageFound(records=len(records), estimated=len(estimated), wrong=wrong)
