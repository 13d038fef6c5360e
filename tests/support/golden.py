"""Scripts of events with the actions that follow, under tests/golden. ``BATON_UPDATE_GOLDEN=1`` rewrites them.

A line that begins with ``>`` is an event: a verb, a name or several, and ``key=value`` options. The indented lines
below it are what the machine wants done. Other lines are comments.
"""

from __future__ import annotations

import enum
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from engine.protocol import Finish
from kv_transfer.handoff.handoff import KvHandoff
from runtime.failures import Failure
from scheduler.api.actions import Placement
from scheduler.api.events import PlanRequested, RunningPlan

GOLDEN = Path(__file__).parent.parent / "golden"

Options = dict[str, Any]
Step = Callable[[str, list[str], Options], Iterable[str]]


def scripts(prefix: str) -> list[Path]:
    """The scripts of one machine; there must be some."""
    found = sorted(GOLDEN.glob(f"{prefix}_*.txt"))
    assert found, prefix
    return found


def check_script(path: Path, step: Step) -> None:
    """What ``step`` says of each event is what the script says."""
    written = path.read_text()
    played = "\n".join(_replay(written, step)) + "\n"
    if os.environ.get("BATON_UPDATE_GOLDEN") == "1":
        path.write_text(played)
    assert played == path.read_text()


def words(action: msgspec.Struct) -> str:
    """An action as its name and the fields that are neither empty nor False."""
    return f"{type(action).__name__} {_fields(action)}".rstrip()


def _fields(value: msgspec.Struct) -> str:
    fields = ((name, getattr(value, name)) for name in value.__struct_fields__)
    return " ".join(f"{name}={_short(each)}" for name, each in fields if each)


def _short(value: Any) -> str:
    match value:
        case None:
            return "-"
        case Placement(worker_id=name) | KvHandoff(lease_id=name) | Finish(reason=name):
            return name
        case Failure():
            # How long is drawn by chance.
            retry = ", Retry-After" if value.retry_after_s else ""
            return f"{value.kind.value}{retry} | {value.message}"
        case RunningPlan():
            return f"{value.plan_id}: {_short(value.prefill)} -> {_short(value.decode)}"
        case PlanRequested():
            return f"{value.plan_id}{_short(sorted(value.excluded_worker_ids)) if value.excluded_worker_ids else ''}"
        case msgspec.Struct():
            return f"({_fields(value)})"
        case enum.Enum():
            return str(value.value)
        case list() | tuple():
            return f"[{', '.join(map(_short, value))}]"
        case float():
            return f"{value:.3g}"
        case _:
            return str(value)


def _replay(script: str, step: Step) -> Iterator[str]:
    for line in script.splitlines():
        if line.startswith("  "):
            continue
        yield line
        if line.startswith(">"):
            verb, *words = shlex.split(line[1:])
            names = [word for word in words if "=" not in word]
            options = {key: _number(value) for key, value in (word.split("=") for word in words if "=" in word)}
            yield from (f"  {said}" for said in step(verb, names, options))


def _number(value: str) -> int | str:
    return int(value) if value.isdigit() else value
