"""The nodes of the tests' Ray cluster, as the kernel sees them: raylets, their actors, and what actors have started."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from launcher.local import procfs

CPUS = 2
CLUSTER = f"test-{os.getpid()}"
"""Name of the clusters of Baton here: the folder of their logs has it, too."""


def raylet_of(pid: int) -> int:
    """The raylet of the node on which an actor has started this process."""
    return _parent(_parent(pid))


def kill_node(ray_cluster: Any, raylet: int) -> None:
    """What the loss of a machine does: its raylet, its actors and all that they run are gone at once."""
    [node] = [one for one in ray_cluster.worker_nodes if one.all_processes["raylet"][0].process.pid == raylet]
    actors = _children(raylet)
    run = [pid for actor in actors for child in _children(actor) for pid in procfs.group_members(child)]
    for one in (raylet, *actors, *run):
        # These clean up shared memory, which would be gone with the machine.
        if not procfs.is_resource_tracker(one):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
    ray_cluster.remove_node(node, allow_graceful=False)


def mentioning(text: str) -> dict[int, str]:
    """Command lines of the processes that have ``text`` among their arguments or in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                words, variables = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
                if text.encode() in words + variables:
                    found[int(entry.name)] = words.decode(errors="replace")
    return found


def _parent(pid: int) -> int:
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            found += [int(entry.name)] if _parent(int(entry.name)) == parent else []
    return found
