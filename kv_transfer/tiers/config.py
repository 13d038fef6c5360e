"""Settings of the KV tiers, and how their text is read. Holds values and their bounds; opens and starts nothing."""

from __future__ import annotations

import difflib
import re
from pathlib import PurePosixPath
from typing import Any

import msgspec

KINDS = ("host", "file", "s3")
"""Tiers as an operator names them, from near to far."""
_FORMS = {"host": "host:SIZE", "file": "file:/FOLDER:SIZE", "s3": "s3://BUCKET/PREFIX:SIZE"}
_OPTIONS = {
    "host": (),
    "file": ("shared", "scope_share", "write_per_s", "gpudirect", "key_file"),
    "s3": ("endpoint", "region", "write_per_s", "required", "key_file"),
}
_VALUES = {
    "gpudirect": re.compile("true|required"),
    "endpoint": re.compile(r"https?://[^/\s]+/?"),
    "region": re.compile(r"\S+"),
    "key_file": re.compile(r"/.+"),
}
_WANTED = {
    "endpoint": "http://HOST:PORT or https://HOST",
    "shared": "true or false",
    "required": "true or false",
    "scope_share": "above 0 and at most 1",
    "gpudirect": "true or required",
    "key_file": "the whole path of a file",
}
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[A-Za-z]*)")
_OPTION = re.compile(r"(?P<name>[a-z_]+)=(?P<value>[^,]*)")
_BUCKET = re.compile(r"//[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.!*'()-]+)*")


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """One tier that an operator asked for."""

    kind: str
    capacity_bytes: int
    place: str = ""
    """The folder of a ``file`` tier; bucket and prefix of an ``s3`` tier."""
    shared: bool = False
    """Whether workers of other machines use the folder too."""
    scope_share: float = 1.0
    """Of the capacity, what the blocks of one cache scope may take."""
    write_bytes_per_s: int = 0
    """What one worker writes there at the most; 0: no bound."""
    gpudirect: str = ""
    """Whether files and GPU exchange KV past host memory: ``true`` where that works, ``required``: or not at all."""
    endpoint: str = ""
    """The address of an S3 server that is not Amazon's."""
    region: str = ""
    required: bool = False
    """Whether an engine is not to start while S3 does not answer."""
    key_file: str = ""
    """A file with what it is encrypted with. Empty: it is not."""


class KvConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where KV is kept that has left the engine's own memory."""

    tiers: tuple[str, ...] = ()
    """Each as ``KIND:PLACE:SIZE[,NAME=VALUE...]``, from near to far. ``host:2GiB``: that much memory of the machine for
    each worker. ``file:/mnt/nvme/kv:50GiB``: so much of a folder for all workers of the machine; with ``,shared=true``
    for all of the cluster, on a file system that they share. ``s3://BUCKET/PREFIX:1TiB``: so much of a bucket, for all
    of the cluster. Empty: no tiers. Watch ``baton_worker_tier_hits``."""

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
    if any(tier.gpudirect for tier in tiers) and any(tier.kind == "s3" for tier in tiers):
        raise ValueError("kv.tiers: with gpudirect there is no s3 tier: KV goes to S3 through host memory only")
    if any(tier.gpudirect and tier.key_file for tier in tiers):
        raise ValueError("kv.tiers: gpudirect and key_file exclude each other: the CPU, which KV passes by, encrypts")
    return tiers


def size_text(size_bytes: int) -> str:
    """A size as an operator writes it, in the largest unit that it fills."""
    unit = max((name for name, size in _UNITS.items() if size_bytes >= size), key=_UNITS.__getitem__, default="KiB")
    return f"{size_bytes / _UNITS[unit]:.4g}{unit}"


def _tier(text: str) -> Tier:
    """From the right: the options, the size, then what stands in front of its colon."""
    front, options = text, []
    while (found := _OPTION.fullmatch(front.rpartition(",")[2])) and "," in front:
        options.append((found["name"], found["value"]))
        front = front.rpartition(",")[0]
    front, colon, size = front.rpartition(":")
    kind, separator, place = front.partition(":")
    if not colon:
        raise ValueError(f"kv.tiers: {text!r} must be KIND:PLACE:SIZE, as in host:2GiB or file:/mnt/nvme/kv:50GiB")
    if kind not in KINDS:
        raise ValueError(f"kv.tiers: {text!r}: there is no tier {kind!r}, only {', '.join(KINDS)}{_near(kind, KINDS)}")
    placed = {
        "host": not separator,
        "file": PurePosixPath(place).is_absolute(),
        "s3": _BUCKET.fullmatch(place) is not None and ".." not in place,
    }
    if not placed[kind]:
        raise ValueError(f"kv.tiers: {text!r} must be {_FORMS[kind]}")
    place, chosen = place.removeprefix("//"), _chosen(text, kind, options)
    return Tier(kind=kind, capacity_bytes=_bytes(text, size), place=place, **chosen)


def _chosen(text: str, kind: str, options: list[tuple[str, str]]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name, value in options:
        if name not in _OPTIONS[kind]:
            known = ", ".join(_OPTIONS[kind]) or "none"
            near = _near(name, _OPTIONS[kind])
            raise ValueError(f"kv.tiers: {text!r}: a {kind} tier has no option {name!r}, only {known}{near}")
        if name in ("shared", "required") and value in ("true", "false"):
            chosen[name] = value == "true"
        elif name == "scope_share" and re.fullmatch(r"0?\.\d+|1(\.0+)?", value) and float(value) > 0:
            chosen[name] = float(value)
        elif name == "write_per_s":
            chosen["write_bytes_per_s"] = _bytes(text, value)
        elif name in _VALUES and _VALUES[name].fullmatch(value):
            chosen[name] = value
        else:
            raise ValueError(f"kv.tiers: {text!r}: {name} must be {_WANTED.get(name, 'given')}")
    return chosen


def _near(word: str, known: tuple[str, ...]) -> str:
    return "".join(f"; did you mean {each!r}?" for each in difflib.get_close_matches(word, known, n=1))


def _bytes(text: str, size: str) -> int:
    found = _SIZE.fullmatch(size)
    unit = _UNITS.get(found["unit"]) if found else None
    if found is None or unit is None:
        raise ValueError(f"kv.tiers: {text!r}: the size {size!r} must be a number and one of {', '.join(_UNITS)}")
    size_bytes = int(float(found["number"]) * unit)
    if size_bytes < 1:
        raise ValueError(f"kv.tiers: {text!r}: the size must be above 0")
    return size_bytes
