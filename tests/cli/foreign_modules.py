"""A folder full of modules that have the names of Baton's packages, as a working folder or PYTHONPATH may hold them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAID = "not the module you meant"


def write(folder: Path, *, without: Collection[str] = ()) -> Path:
    """Modules that end every process which imports them, but for those named ``without``."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in ROOT.glob("*/__init__.py"):
        if (name := package.parent.name) not in without:
            (folder / f"{name}.py").write_text(f"raise SystemExit({SAID!r})\n")
    return folder
