"""Settings of the KV tiers, and how their text is read. Holds values and their bounds; opens and starts nothing."""

from __future__ import annotations

import difflib
import re
from pathlib import PurePosixPath

import msgspec

KINDS = ("host", "file")
"""Tiers as an operator names them, from near to far."""
_WITH_PLACE = ("file",)
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[A-Za-z]*)")


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """One tier that an operator asked for."""

    kind: str
    capacity_bytes: int
    place: str = ""
    """The folder of a ``file`` tier."""


class KvConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where KV is kept that has left the engine's own memory."""

    tiers: tuple[str, ...] = ()
    """Each as ``KIND:PLACE:SIZE``, from near to far. ``host:2GiB``: that much memory of the machine for each worker.
    ``file:/mnt/nvme/kv:50GiB``: so much of a folder for each worker. Empty: no tiers. Watch
    ``baton_worker_tier_hits``."""

    def __post_init__(self) -> None:
        parse(self.tiers)


def parse(texts: tuple[str, ...]) -> tuple[Tier, ...]:
    """The tiers of a configuration. Raises ValueError naming the setting and what is wrong with it."""
    tiers = tuple(_tier(text) for text in texts)
    for kind in KINDS:
        if sum(tier.kind == kind for tier in tiers) > 1:
            raise ValueError(f"kv.tiers: {kind!r} is there twice; a worker has one")
    if tiers and tiers[0].kind != "host":
        raise ValueError("kv.tiers: the first must be a host tier, through which KV comes and goes; add host:SIZE")
    return tiers


def size_text(size_bytes: int) -> str:
    """A size as an operator writes it, in the largest unit that it fills."""
    unit = max((name for name, size in _UNITS.items() if size_bytes >= size), key=_UNITS.__getitem__, default="KiB")
    return f"{size_bytes / _UNITS[unit]:.4g}{unit}"


def _tier(text: str) -> Tier:
    """From the right: the size, then what stands in front of its colon."""
    front, colon, size = text.rpartition(":")
    kind, separator, place = front.partition(":")
    if not colon:
        raise ValueError(f"kv.tiers: {text!r} must be KIND:PLACE:SIZE, as in host:2GiB or file:/mnt/nvme/kv:50GiB")
    if kind not in KINDS:
        near = "".join(f"; did you mean {each!r}?" for each in difflib.get_close_matches(kind, KINDS, n=1))
        raise ValueError(f"kv.tiers: {text!r}: there is no tier {kind!r}, only {', '.join(KINDS)}{near}")
    if bool(separator) != (kind in _WITH_PLACE) or (separator and not PurePosixPath(place).is_absolute()):
        form = f"{kind}:/FOLDER:SIZE" if kind in _WITH_PLACE else f"{kind}:SIZE"
        raise ValueError(f"kv.tiers: {text!r} must be {form}")
    return Tier(kind=kind, capacity_bytes=_bytes(text, size), place=place)


def _bytes(text: str, size: str) -> int:
    found = _SIZE.fullmatch(size)
    unit = _UNITS.get(found["unit"]) if found else None
    if found is None or unit is None:
        raise ValueError(f"kv.tiers: {text!r}: the size {size!r} must be a number and one of {', '.join(_UNITS)}")
    size_bytes = int(float(found["number"]) * unit)
    if size_bytes < 1:
        raise ValueError(f"kv.tiers: {text!r}: the size must be above 0")
    return size_bytes
