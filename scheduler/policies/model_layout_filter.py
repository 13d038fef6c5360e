"""Pairs prefill and decode workers whose KV caches are laid out alike. KV never moves between other pairs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from scheduler.cluster import Worker


class LayoutGroup(msgspec.Struct, frozen=True, gc=False):
    """Workers of one layout. ``prefills`` may be empty, ``decodes`` never is."""

    prefills: Sequence[Worker]
    decodes: Sequence[Worker]


def layout_groups(prefills: Sequence[Worker], decodes: Sequence[Worker]) -> Sequence[LayoutGroup]:
    """One group per layout that has a decode worker; groups with a prefill worker come first.

    The fingerprint covers the model, so equal layouts also mean equal weights.
    """
    by_layout: dict[str, tuple[list[Worker], list[Worker]]] = {}
    for worker in decodes:
        by_layout.setdefault(worker.fingerprint, ([], []))[1].append(worker)
    for worker in prefills:
        if worker.fingerprint in by_layout:
            by_layout[worker.fingerprint][0].append(worker)
    groups = [LayoutGroup(of_prefill, of_decode) for of_prefill, of_decode in by_layout.values()]
    return sorted(groups, key=lambda group: not group.prefills)
