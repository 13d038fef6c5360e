"""Secrets in files that their owner alone can read. Shows none of them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from runtime.user_error import UserError

_OTHERS = 0o077


def secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """What the file holds; where it is missing it is made, once however many processes do it at a time.

    Raises UserError for a file that is empty, or that others may read.
    """
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and then linked: no process may ever read a part.
        made = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.new")
        if not path.exists():
            descriptor = os.open(made, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(make())
                    os.fsync(file.fileno())
                os.link(made, path)
            finally:
                made.unlink()
    return read(path)


def read(path: Path) -> bytes:
    """What the file holds. Raises OSError, and UserError for a file that is empty, or that others may read."""
    if path.stat().st_mode & _OTHERS:
        raise UserError(f"{path} may be read by others: chmod 600 {path}")
    held = path.read_bytes().strip()
    if not held:
        raise UserError(f"{path} is empty")
    return held
