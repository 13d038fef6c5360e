"""Looks now and then which segments a shared store holds, in a thread of its own, and tells what came and went.

The scheduler half takes the news when it has a moment, and waits for no disk and no network.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import structlog

from kv_transfer.tiers.segment import BadSegment, Entry, Index, parse_name
from kv_transfer.tiers.store_blocks import Segment

log = structlog.get_logger(__name__)

_INDEX_READERS = 8
# Segments whose index is read before the first of them are told.
_READ_TOGETHER = 256
_FIRST_LOOK_MAX_S = 5.0


class Appeared(msgspec.Struct, frozen=True):
    """A segment that can be read, and what routing is to know of its blocks."""

    segment: Segment
    entries: tuple[Entry, ...]


class Vanished(msgspec.Struct, frozen=True):
    """A segment that cannot be read any more."""

    name: str


class Unreachable(msgspec.Struct, frozen=True):
    """The store does not answer; an empty ``why``: it does again."""

    why: str


News = Appeared | Vanished | Unreachable


class StoreView(ABC):
    """What every rank's part of a store holds."""

    def ask(self) -> None:  # noqa: B027 - nothing, where listing is quick
        """Return when it has answered anything: a long listing takes a while. Raises OSError."""

    @abstractmethod
    def names(self) -> set[str]:
        """Segments of which every rank's part is there. Raises OSError."""

    @abstractmethod
    def indexes(self, name: str) -> Sequence[Index]:
        """A segment's index, by rank. Raises BadSegment and OSError."""


def segment_of(name: str, indexes: Sequence[Index], *, fingerprint: str) -> Appeared:
    """A segment from what its parts say. Raises BadSegment where they do not belong together."""
    first, about = indexes[0], parse_name(name)
    assert about is not None
    keys = tuple(entry.key for entry in first.entries)
    for rank, index in enumerate(indexes):
        if (index.fingerprint, index.rank, index.ranks) != (fingerprint, rank, len(indexes)):
            raise BadSegment("of another model, layout or rank")
        if tuple(entry.key for entry in index.entries) != keys or index.scope != about.scope:
            raise BadSegment("its parts are not of one segment")
    sums = tuple(b"".join([entry.checksum for entry in index.entries]) for index in indexes)
    depth = first.entries[0].depth_tokens
    size = about.size_bytes * len(indexes)
    return Appeared(Segment(name, about.scope, size, keys, sums, depth), first.entries)


class StoreWatch:
    """Watches until ``close``."""

    def __init__(self, view: StoreView, *, fingerprint: str, interval_s: float, place: str) -> None:
        self._view = view
        self._fingerprint = fingerprint
        self._interval_s = interval_s
        self._place = place
        self._known: set[str] = set()
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._why = ""
        self._answered = self._listed = False
        self._stop = threading.Event()
        self._looked = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kv-store-watch", daemon=True)
        self._thread.start()
        # What lies there is known before the first request, unless that takes long.
        self._looked.wait(_FIRST_LOOK_MAX_S)

    def take(self) -> Iterator[News]:
        """What is new since the last call."""
        while True:
            try:
                yield self._news.get_nowait()
            except queue.Empty:
                return

    @property
    def why_off(self) -> str:
        """Why the store does not answer; empty: it does, whatever became of single segments."""
        if self._listed:
            return ""
        return self._why or ("" if self._answered else f"it has not answered in {_FIRST_LOOK_MAX_S:.0f} s")

    @property
    def has_news(self) -> bool:
        """Whether ``take`` has something."""
        return not self._news.empty()

    def close(self) -> None:
        """Stop."""
        self._stop.set()

    def _watch(self) -> None:
        with ThreadPoolExecutor(_INDEX_READERS, "kv-store-index") as pool:
            while not self._stop.is_set():
                why = ""
                try:
                    self._look(pool)
                except Exception as error:  # noqa: BLE001 - whatever a store does, the watch goes on
                    why = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                changed, self._why = why != self._why, why
                self._looked.set()
                if changed:
                    self._news.put(Unreachable(why))
                    if why:
                        log.warning("a tier of kv.tiers is off; serving goes on", tier=self._place, why=why)
                    else:
                        log.info("a tier of kv.tiers answers again", tier=self._place)
                self._stop.wait(self._interval_s)

    def _look(self, pool: ThreadPoolExecutor) -> None:
        self._view.ask()
        self._answered = True
        names = self._view.names()
        self._listed = True
        for name in self._known - names:
            self._news.put(Vanished(name))
        self._known &= names
        new = sorted(names - self._known)
        for first in range(0, len(new), _READ_TOGETHER):
            some = new[first : first + _READ_TOGETHER]
            if self._stop.is_set():
                return
            for found in pool.map(self._read, some):
                if found is not None:
                    self._news.put(found)
        # Those that could not be read too: they do not change.
        self._known |= set(new)

    def _read(self, name: str) -> Appeared | None:
        try:
            return segment_of(name, self._view.indexes(name), fingerprint=self._fingerprint)
        except FileNotFoundError:
            return None
        except BadSegment as error:
            log.warning("a KV segment is not used", store=self._place, segment=name, why=str(error))
            return None
