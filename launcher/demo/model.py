"""The demo model: its files lie beside this one, in ``weights``. Copies them where they are wanted; loads nothing.

``launcher/demo/training.py`` made them, and says how.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from runtime.user_error import UserError

NAME = "baton-demo"
CHAT_TOOL_PARSER = "hermes"
DTYPE = "float32"
SHIPPED = Path(__file__).with_name("weights")
_KEY_LENGTH = 12


class DemoModelError(UserError):
    """The demo model cannot be put where it shall lie; the message says why, in a sentence."""


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """Default folder of models that are made on this machine."""
    base = environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if base else Path.home() / ".cache") / "baton"


def ensure(cache_dir: Path | None = None) -> Path:
    """The folder of the demo model: a copy below ``cache_dir``, or the shipped one when that is None.

    Raises DemoModelError.
    """
    if cache_dir is None:
        return SHIPPED
    wanted = cache_dir / f"demo-{key()}"
    # The folder appears by one rename, whole; a file of it stands for all.
    if (wanted / "config.json").is_file():
        return wanted
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".demo-", dir=cache_dir) as temporary:
            made = Path(shutil.copytree(SHIPPED, Path(temporary) / "demo", copy_function=shutil.copyfile))
            try:
                made.rename(wanted)
            except OSError:
                # Another process was quicker.
                if not (wanted / "config.json").is_file():
                    raise
    except (OSError, shutil.Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DemoModelError(f"cannot put the demo model into {cache_dir}: {why}") from error
    return wanted


def key() -> str:
    """Digest of the shipped files."""
    digest = hashlib.sha256()
    for file in sorted(SHIPPED.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:_KEY_LENGTH]
