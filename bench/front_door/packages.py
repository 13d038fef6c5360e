"""Where the peers' packages are: installed already, or put into a folder that is thrown away. Starts no peer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
_INSTALL_TIMEOUT_S = 600.0


def why_missing(modules: str, requirements: str, folder: Path) -> str:
    """Empty when ``modules`` can be imported with ``folder`` on the path, installed there if need be; else why not."""
    if not (why := _imports(modules, folder)):
        return ""
    pinned = REQUIREMENTS / requirements
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "-r", str(pinned)]
    installed = subprocess.run(argv, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    if installed.returncode == 0 and not (why := _imports(modules, folder)):
        return ""
    said = next((line for line in installed.stderr.splitlines() if line.startswith("ERROR")), why)
    by_hand = f"pip install --no-deps --target DIR -r requirements/{requirements}"
    return f"{said} (to install it by hand: {by_hand}; then --peers-dir DIR)"


def _imports(modules: str, folder: Path) -> str:
    """What goes wrong when a peer's modules are imported; empty: nothing."""
    # Not with Baton's own folders, whose packages have general names.
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    argv = [sys.executable, "-c", f"import {modules}"]
    ran = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    return "" if ran.returncode == 0 else (ran.stderr.strip() or "it cannot be imported").splitlines()[-1]
