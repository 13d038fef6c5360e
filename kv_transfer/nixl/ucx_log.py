"""By which transport KV is pulled. NIXL names its backend alone; UCX says it in its own log, which goes to a file here.

Imports nothing of vLLM or NIXL, and decides nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import tempfile
from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import BinaryIO

FILE_VARIABLE = "UCX_LOG_FILE"
TABLES_VARIABLE = "UCX_PROTO_INFO"
_STAMP = re.compile(r"^\[\d+\.\d+\] \[[^\]]*\]\s*")
_PULL = "remote memory read by "
_TRANSPORT = re.compile(r"\b([a-z]\w*)/\w")
"""Of ``rc_mlx5/mlx5_0:1``: the transport before its device."""


class UcxLog:
    """UCX's log of this process, from the moment that it is loaded. Where the operator has its own, nothing is read."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Before NIXL makes its first agent here: UCX opens its log when it is loaded."""
        self._environ = environ
        self._path = ""
        self._file: BinaryIO | None = None
        if not {FILE_VARIABLE, TABLES_VARIABLE} & environ.keys():
            with contextlib.suppress(OSError):
                descriptor, self._path = tempfile.mkstemp(prefix="baton-ucx-")
                self._file = os.fdopen(descriptor, "rb")
                environ.update({FILE_VARIABLE: self._path, TABLES_VARIABLE: "y"})

    def opened(self) -> None:
        """UCX has the file open: it needs no name any more, and no process that is started here may make it anew."""
        if self._path:
            del self._environ[FILE_VARIABLE], self._environ[TABLES_VARIABLE]
            Path(self._path).unlink()
            self._path = ""

    def read(self) -> tuple[set[str], list[str]]:
        """What UCX wrote since this was called: transports of pulls, and its warnings and errors."""
        if self._file is None:
            return set(), []
        # UCX writes through C's buffers.
        ctypes.CDLL(None).fflush(None)
        return transports_and_rest(self._file.read().decode(errors="replace").splitlines())

    def close(self) -> None:
        """Read no more."""
        self.opened()
        if self._file is not None:
            self._file.close()
            self._file = None


def transports_and_rest(lines: Iterable[str]) -> tuple[set[str], list[str]]:
    """The transports in UCX's tables of remote reads, and the lines that are of no table.

    A table's title says what it is of; each of its rows ends with the transports of one range of sizes.
    """
    transports: set[str] = set()
    rest: list[str] = []
    pulls = False
    for stamped in lines:
        line = _STAMP.sub("", stamped)
        cells: Sequence[str] = line.strip("| ").split("|")
        if line.startswith("|") and " by ucp_" in line:
            pulls = _PULL in line
        elif line.startswith("|") and len(cells) > 1:
            transports.update(_TRANSPORT.findall(cells[-1]) if pulls else ())
        elif line and not line.startswith(("|", "+")):
            rest.append(line)
    return transports, rest


def without_tcp(tls: str) -> str:
    """``UCX_TLS`` without TCP, so that a pull fails instead of taking it. Empty: all that UCX knows but TCP."""
    names = [name for name in tls.removeprefix("^").split(",") if name not in ("", "tcp", "all")]
    if tls.startswith("^"):
        return ",".join(["^tcp", *names])
    return ",".join(names) or "^tcp"
