"""The table of `baton doctor`: one row for each thing that was looked at. Looks at nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from runtime.columns import aligned

Verdict = Literal["ok", "warn", "fail"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One thing, what it is like, and what to do about it where it is not ``ok``."""

    check: str
    of: str
    verdict: Verdict
    found: str
    do: str = ""


def failed(rows: Sequence[Row]) -> bool:
    """Whether something must be changed."""
    return any(row.verdict == "fail" for row in rows)


def as_table(rows: Sequence[Row]) -> str:
    """The form for people."""
    titles = [name.upper() for name in Row.__struct_fields__]
    return "\n".join(aligned([titles, *([row.check, row.of, row.verdict, row.found, row.do] for row in rows)]))


def as_json(rows: Sequence[Row]) -> str:
    """The machine-readable form."""
    return msgspec.json.format(msgspec.json.encode({"rows": list(rows)}), indent=2).decode()
