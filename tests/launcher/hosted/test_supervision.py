"""In which order processes start, when a dead one is started again, and when no more (tests/support/golden.py).

``> begin`` starts a cluster, and ``> up`` one whose processes are all ready at once; both take settings of ``Timing``.
``at=`` is the time of an event in seconds. ``> due`` tells when the next ``tick`` is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from launcher.backend import BecameReady, Ended, Placed, Waiting
from launcher.config import BatonConfig, LauncherConfig
from launcher.hosted.process_plan import plan
from launcher.hosted.supervision import (
    Action,
    Event,
    Replace,
    Retire,
    StatusChecked,
    Supervision,
    Tick,
)
from launcher.hosted.timing import Timing
from tests.support.golden import Options, check_script, scripts, words

SPECS = plan(BatonConfig(launcher=LauncherConfig(prefill=1, decode=2)))
TIMING = Timing(
    progress_interval_s=5.0,
    restart_backoff_min_s=1.0,
    restart_backoff_max_s=5.0,
    restarts_max=4,
    restart_window_s=100.0,
)
EVENTS: dict[str, Callable[[str, Options], Event]] = {
    "ready": lambda name, _: BecameReady(name),
    "ended": lambda name, options: Ended(name, int(options["code"])),
    "waits": lambda name, _: Waiting(name, "waits for room"),
    "placed": lambda name, _: Placed(name),
    "taken": lambda name, _: Placed(name, taken_over=True),
    "replace": lambda name, _: Replace(name),
    "retire": lambda name, _: Retire(name),
    "answered": lambda name, _: StatusChecked(name, answered=True),
    "silent": lambda name, _: StatusChecked(name, answered=False),
}


class Play:
    """The supervision of one cluster, from its ``begin`` on."""

    machine: Supervision

    def step(self, verb: str, names: list[str], options: Options) -> Sequence[str]:
        """What the machine wants done."""
        if verb == "due":
            return [str(self.machine.due_s())]
        now_s = float(options.pop("at", 0))
        return [words(action) for action in self._act(verb, names, options, now_s)]

    def _act(self, verb: str, names: list[str], options: Options, now_s: float) -> Sequence[Action]:
        match verb:
            case "begin":
                timing = msgspec.structs.replace(TIMING, **options)
                self.machine = Supervision(SPECS, timing, start_timeout_s=60.0)
                return self.machine.begin(now_s)
            case "up":
                self._act("begin", [], options, now_s)
                return self._act("ready", [spec.id for spec in SPECS], {}, now_s)[-1:]
            case "add":
                [name] = names
                return self.machine.add(msgspec.structs.replace(SPECS[-2], id=name), now_s)
            case "tick":
                return self.machine.handle(Tick(), now_s)
            case _:
                events = (EVENTS[verb](name, options) for name in names)
                return [action for event in events for action in self.machine.handle(event, now_s)]


@pytest.mark.parametrize("script", scripts("supervision"), ids=lambda path: path.stem)
def test_what_is_done_with_processes_follows_the_script(script: Path) -> None:
    check_script(script, Play().step)
