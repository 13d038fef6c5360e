"""How every command of Baton starts: its own folder first on the path, then the command. Holds no code that serves.

Baton's packages have general names, ``worker`` or ``engine``. Modules of these names in the working folder or on
PYTHONPATH must not take their place: not here, and not in a process that this one or a library starts.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent)


def command(*words: str) -> list[str]:
    """What starts `baton` in a child process, from any working folder."""
    return [sys.executable, "-P", str(Path(FOLDER, "baton_llm.py")), *words]


def main() -> int:
    """Run the `baton` command."""
    from cli.app import main as run

    return run()


def _go_first() -> None:
    if sys.path[:1] != [FOLDER]:
        sys.path.insert(0, FOLDER)
    # Python puts the working folder first in `python -m`, which vLLM starts too. An empty value set before stays.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != FOLDER]
    # Without others, a Baton that is installed is found anyway; its neighbours need not go before Python's own modules.
    if others or FOLDER not in site.getsitepackages():
        os.environ["PYTHONPATH"] = os.pathsep.join([FOLDER, *others])


_go_first()

if __name__ == "__main__":
    sys.exit(main())
