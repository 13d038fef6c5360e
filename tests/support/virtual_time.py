"""Coroutine tests in virtual time: every wait is over at once, and the loop's clock says how long it was."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

from simulation.kernel import virtual_loop

P = ParamSpec("P")


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """``test`` as a plain function that pytest calls."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        virtual_loop.run(test(*args, **kwargs))

    return run
