"""A module ``sitecustomize`` for all processes of a test's cluster: it holds a rollout where the test's folder says so.

The file ``stage-1`` in the folder HELD_RANKS_DIR holds rank 1 before it takes a map: it writes its process id into
``stage-1.held``, and goes on once ``stage-1`` is gone. So do ``arm``, ``apply`` (weights have moved, columns are not
written), ``verify`` (the map is live, and not reported) and ``plan-0``, in the scheduler. While ``lose-1`` is there no
map reaches rank 1; with ``change-1`` another one does. Without the folder nothing is changed.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HOLD_MAX_S, POLL_S = 60.0, 0.02


def asked(what: str, rank: int) -> bool:
    """Whether the test wants this of a rank."""
    return _file(what, rank).exists()


def hold(what: str, rank: int) -> None:
    """Wait here for as long as the test says, with the thread that comes by."""
    for _ in _turns(what, rank):
        threading.Event().wait(POLL_S)


async def hold_task(what: str, rank: int) -> None:
    """The same, and the event loop goes on."""
    for _ in _turns(what, rank):
        await asyncio.sleep(POLL_S)


def _file(what: str, rank: int) -> Path:
    return Path(os.environ["HELD_RANKS_DIR"], f"{what}-{rank}")


def _turns(what: str, rank: int) -> Iterator[None]:
    if asked(what, rank):
        _file(what, rank).with_suffix(".held").write_text(str(os.getpid()))
    until_s = time.monotonic() + HOLD_MAX_S
    while asked(what, rank) and time.monotonic() < until_s:
        yield


def _of_ranks(extension: ModuleType) -> None:
    """Hold ranks. ``extension``: engine.vllm.experts.extension."""
    session, live = extension.session.RankSession, extension.placement.LivePlacement
    take, write, report = session._take, live._write_columns, live.report
    rank_of: dict[int, int] = {}

    async def taken(self: Any, message: Any) -> None:
        kind, rank = message.WhichOneof("message"), self._facts.rank
        rank_of[id(self._live)] = rank
        if kind == "stage":
            if asked("lose", rank):
                return
            if asked("change", rank):
                half = len(message.stage.map.slots) // 2
                for name in ("slots", "columns"):
                    whole = getattr(message.stage.map, name)
                    # The layers in another order: a valid map, and not the one that was sent.
                    setattr(message.stage.map, name, whole[half:] + whole[:half])
        if kind in ("stage", "arm"):
            await hold_task(kind, rank)
        await take(self, message)

    def written(self: Any, placed: Any) -> None:
        hold("apply", rank_of.get(id(self), -1))
        write(self, placed)

    said: dict[int, int] = {}

    def reported(self: Any) -> Any:
        told = report(self)
        if told.live_version > said.get(id(self), 0):
            hold("verify", rank_of.get(id(self), -1))
        said[id(self)] = told.live_version
        return told

    session._take, live._write_columns, live.report = taken, written, reported


def _of_plans(groups: ModuleType) -> None:
    """Hold the scheduler while it decides. ``groups``: scheduler.experts.groups."""
    run = groups.Solve.run

    def held(self: Any) -> Any:
        hold("plan", 0)
        return run(self)

    groups.Solve.run = held


_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "engine.vllm.experts.extension": _of_ranks,
    "scheduler.experts.groups": _of_plans,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Changes a module right after it was imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def then(module: ModuleType) -> None:
            execute(module)
            _AFTER[name](module)

        spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec


if "HELD_RANKS_DIR" in os.environ:
    sys.meta_path.insert(0, _Finder())
