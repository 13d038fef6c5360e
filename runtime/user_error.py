"""What a person has to put right: one sentence instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A command cannot do what it was asked to; its text says why, and the command ends with ``exit_code``."""

    exit_code = 1
