"""Ids that no other has, and that need not be secret. Their chance is not the system's: a call of it costs more."""

from __future__ import annotations

import os
import random

_chance = random.Random(os.urandom(32))


def new_id() -> str:
    """32 hexadecimal digits, as of a UUID."""
    return f"{_chance.getrandbits(128):032x}"
