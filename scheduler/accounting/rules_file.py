"""Reads the operator's file of prices, teams and limits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from accounts import rules
from accounts.config import AccountsConfig
from accounts.key_table import Key
from accounts.rules import Rules
from runtime.configuration import BadConfiguration

_VERSION_CHARACTERS = 12


def read(config: AccountsConfig, model: str = "") -> Rules:
    """The rules in force. ``model``: served, and must have a price. Raises BadConfiguration."""
    if not config.rules_file:
        if config.mode == "enforce":
            raise BadConfiguration("accounts.rules_file", "must be set where accounts.mode is enforce", "configuration")
        return Rules()
    path = Path(config.rules_file).expanduser()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfiguration("accounts.rules_file", f"cannot be read: {error}", str(path)) from None
    version = hashlib.sha256(text.encode()).hexdigest()[:_VERSION_CHARACTERS]
    return rules.read(text, str(path), version=version, model=model if config.mode == "enforce" else "")


def warnings(held: Rules, keys: Iterable[Key], source: str) -> list[str]:
    """What looks like a mistake: a sentence each."""
    named = {key.team for key in keys if not key.revoked}
    return [f"{source}: teams.{team}: no key names this team" for team in held.teams if team not in named]
