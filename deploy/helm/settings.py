"""The names of Baton's settings, for the chart to check `config` by. Run `make chart` after a change of settings."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.config import BatonConfig
from runtime.configuration import load, settings

FILE = Path(__file__).parent / "baton" / "settings.json"
# Of other places than pods.
_LEFT_OUT = ("launcher.",)


def names() -> list[str]:
    """Dotted paths, in the order of declaration."""
    paths = [setting.path for setting in settings(load(BatonConfig, file=None, environ={}, sets=()))]
    return [path for path in paths if not path.startswith(_LEFT_OUT)]


if __name__ == "__main__":
    FILE.write_text(json.dumps(names(), indent=1) + "\n")
