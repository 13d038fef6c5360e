"""A private folder for the temporary files of one process and all it starts, removed behind them however they end.

vLLM puts unix sockets and rendezvous files into the temporary folder, and removes them only when it ends in order.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from runtime.text import is_text

PREFIX = "baton-"
# A unix socket's path has 107 bytes at most; vLLM's sockets are named by a UUID.
PATH_BYTES_MAX = 107 - len("/00000000-0000-0000-0000-000000000000")
_SHORT_PARENTS = ("/tmp", "/var/tmp")  # noqa: S108 - mkdtemp makes a folder of our own there


def make(parents: tuple[str, ...] | None = None) -> Path:
    """A new folder, in the temporary folder of this process or, where its name is too long or no text, in another one.

    Raises OSError when nothing can be made anywhere.
    """
    refused: OSError | None = None
    for parent in parents or (tempfile.gettempdir(), *_SHORT_PARENTS):
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            refused = refused or error
            continue
        if is_text(str(folder)) and len(os.fsencode(folder)) <= PATH_BYTES_MAX:
            return folder
        folder.rmdir()
    raise refused or OSError(f"no folder for temporary files has a name of at most {PATH_BYTES_MAX} bytes")


def environment(folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` of a process with its temporary files in ``folder``."""
    # What torch compiled is kept elsewhere, or every start would compile it again.
    kept = {
        "VLLM_RPC_BASE_PATH": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")),
    }
    return kept | dict(environ) | {"TMPDIR": str(folder)}


def remove(folder: Path) -> None:
    """Delete it with all that is in it, as far as it can be deleted."""
    shutil.rmtree(folder, ignore_errors=True)
