"""Ends a child process whose parent has died, however it died. Knows nothing of what the child does."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable

_GRACE_S = 5.0


def _nothing() -> None:
    """Nothing is left behind by most."""


def stop_with_parent(grace_s: float = _GRACE_S, *, clean_up: Callable[[], None] = _nothing) -> Callable[[], None]:
    """Send this process SIGTERM once its parent has ended, and end it hard ``grace_s`` later.

    One that leads a process group ends all of it then.

    ``clean_up`` does what the parent would have done behind it. Call what this returns at the end of the process: it
    cleans up when the parent is dead. Where the process ends hard, or before it listens to signals, that is done here.

    A thread waits on the parent's pidfd: no polling, and unlike PR_SET_PDEATHSIG it does not fire when only the
    parent's *thread* that started us has ended.
    """
    parent = os.getppid()

    def clean_up_behind_parent() -> None:
        if os.getppid() != parent:
            clean_up()

    try:
        fd = os.pidfd_open(parent)
    except (AttributeError, OSError):
        return clean_up_behind_parent  # not Linux, or the parent is gone already and init has us

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
            poll.unregister(fd)
            poll.poll(int(grace_s * 1000))
        clean_up()
        if os.getpgrp() == os.getpid():
            # With what it started, such as an engine that loads its model and does not notice.
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="baton-parent-watch", daemon=True).start()
    return clean_up_behind_parent
