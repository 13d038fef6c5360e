"""Ends a child process whose parent has died, however it died. Knows nothing of what the child does."""

from __future__ import annotations

import os
import select
import signal
import threading

_GRACE_S = 5.0


def stop_with_parent(grace_s: float = _GRACE_S) -> None:
    """Send this process SIGTERM once its parent has ended, and end it hard ``grace_s`` later.

    A thread waits on the parent's pidfd: no polling, and unlike PR_SET_PDEATHSIG it does not fire when only the
    parent's *thread* that started us has ended.
    """
    parent = os.getppid()
    try:
        fd = os.pidfd_open(parent)
    except (AttributeError, OSError):
        return  # not Linux, or the parent is gone already and init has us

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        poll.unregister(fd)
        poll.poll(int(grace_s * 1000))
        os._exit(1)

    threading.Thread(target=watch, name="baton-parent-watch", daemon=True).start()
