"""When a store that an engine needs answers: a long listing, or a segment that cannot be read, is no silence."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from kv_transfer.stores import watch as watch_module
from kv_transfer.stores.watch import StoreView, StoreWatch
from kv_transfer.tiers.segment import Index
from tests.kv_transfer.stores.segments import FINGERPRINT


class View(StoreView):
    """A store that stops at one of three steps: it waits there, or fails."""

    def __init__(self, stops_at: str, how: str) -> None:
        self.stops_at, self.how = stops_at, how
        self.go_on = threading.Event()

    def ask(self) -> None:
        self._step("ask")

    def names(self) -> set[str]:
        self._step("names")
        return {"segment"}

    def indexes(self, name: str) -> Sequence[Index]:
        self._step("indexes")
        raise FileNotFoundError

    def _step(self, name: str) -> None:
        if name == self.stops_at:
            if self.how == "fails":
                raise OSError("AccessDenied")
            self.go_on.wait()


@pytest.mark.parametrize(
    ("stops_at", "how", "told"),
    [
        ("ask", "waits", "it has not answered in 5 s"),
        ("names", "waits", ""),
        ("indexes", "waits", ""),
        ("ask", "fails", "AccessDenied"),
        ("names", "fails", "AccessDenied"),
        ("indexes", "fails", ""),
    ],
)
def test_a_store_that_is_required_has_to_answer_and_no_more(
    monkeypatch: pytest.MonkeyPatch, stops_at: str, how: str, told: str
) -> None:
    monkeypatch.setattr(watch_module, "_FIRST_LOOK_MAX_S", 0.3)
    view = View(stops_at, how)
    watch = StoreWatch(view, fingerprint=FINGERPRINT, interval_s=60.0, place="there")
    assert watch.why_off == told.replace("5 s", "0 s")
    watch.close()
    view.go_on.set()
