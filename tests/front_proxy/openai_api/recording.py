"""Deltas that real engines gave, and the requests that they belong to: a file of one request a line.

``tests/e2e/test_recorded_deltas.py`` makes it, and says how.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from engine.protocol import Finish
from front_proxy.request.generation import GenerationDelta
from tests.support.golden import GOLDEN

FILE = GOLDEN / "deltas.jsonl"

_Delta = tuple[list[int], int | None, int, str | None, int | None]


class Recorded(msgspec.Struct):
    """One request. ``steps``: the number of the sequence, and the deltas that its reader found at once."""

    path: str
    body: dict[str, Any]
    steps: list[tuple[int, list[GenerationDelta]]]


def write(about: dict[str, str], requests: Iterable[Recorded], file: Path = FILE) -> None:
    """A first line that says what this is, then the requests. A delta is its tokens, and what else it has."""
    lines: list[Any] = [about]
    for each in requests:
        steps = [(index, [_short(delta) for delta in deltas]) for index, deltas in each.steps]
        lines.append({"path": each.path, "body": each.body, "steps": steps})
    texts = (json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines)
    file.write_text("".join(f"{text}\n" for text in texts))


def read(file: Path = FILE) -> list[Recorded]:
    """The requests."""
    _, *lines = file.read_text().splitlines()
    requests = [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    return [
        Recorded(
            path=each["path"],
            body=each["body"],
            steps=[(index, [_long(*delta) for delta in deltas]) for index, deltas in each["steps"]],
        )
        for each in requests
    ]


def _short(delta: GenerationDelta) -> list[Any]:
    reason, stop_token_id = (None, None) if delta.finish is None else msgspec.structs.astuple(delta.finish)
    values = [delta.token_ids, delta.cached_tokens, int(delta.decode_worker is not None), reason, stop_token_id]
    while not values[-1] and len(values) > 1:
        values.pop()
    return values


def _long(
    token_ids: list[int],
    cached_tokens: int | None = None,
    landed: int = 0,
    reason: Any = None,
    stop_token_id: int | None = None,
) -> GenerationDelta:
    return GenerationDelta(
        token_ids=token_ids,
        cached_tokens=cached_tokens,
        decode_worker="decode-0" if landed else None,
        finish=None if reason is None else Finish(reason, stop_token_id),
    )
