"""Another commit of Baton in a worktree and an environment of its own, both removed afterwards. Starts no server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_GIT_TIMEOUT_S = 120.0
_SETUP_TIMEOUT_S = 1800.0
# What fixes an environment; where both commits have the same, this Python is the other's environment too.
_PINS = ("cpu.txt", "cuda.txt")


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with that commit: ``commit`` itself where it names a folder, else a new worktree.

    Raises ValueError when there is no such commit, or its environment cannot be made.
    """
    if Path(commit).is_dir():
        yield Path(commit).absolute()
        return
    with tempfile.TemporaryDirectory(prefix="baton-earlier-") as temporary:
        worktree = Path(temporary) / "baton"
        _run(["git", "worktree", "add", "--quiet", "--detach", str(worktree), commit], ROOT, _GIT_TIMEOUT_S)
        try:
            if any(_pins(ROOT, name) != _pins(worktree, name) for name in _PINS):
                print(f"making an environment for {commit}: its packages are not ours", file=sys.stderr, flush=True)
                _run(["make", "setup", f"PYTHON={sys.executable}"], worktree, _SETUP_TIMEOUT_S)
            yield worktree
        finally:
            _run(["git", "worktree", "remove", "--force", str(worktree)], ROOT, _GIT_TIMEOUT_S)


def _pins(root: Path, name: str) -> str:
    path = root / "requirements" / name
    return path.read_text() if path.is_file() else ""


def _run(argv: list[str], folder: Path, timeout_s: float) -> None:
    ran = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
    if ran.returncode != 0:
        raise ValueError(f"{' '.join(argv[:3])} failed: {ran.stderr.strip()[-2000:]}")
