"""The two secrets of a cluster: the pepper of all keys, and the administrator's key. Shows neither."""

from __future__ import annotations

import secrets
from pathlib import Path

from accounts.config import AuthConfig
from accounts.keys import id_of, mint
from runtime.secret_file import secret
from runtime.user_error import UserError

PEPPER_BYTES = 32
PEPPER, ADMIN_KEY = "pepper", "admin.key"


def pepper(auth: AuthConfig) -> bytes:
    """What digests of keys depend on. Made where it is missing. Raises UserError."""
    return secret(_folder(auth) / PEPPER, lambda: secrets.token_hex(PEPPER_BYTES).encode())


def admin_key(auth: AuthConfig) -> str:
    """The key that commands use. Made where it is missing; another one takes its place at the scheduler's next start.

    Raises UserError.
    """
    path = _folder(auth) / ADMIN_KEY
    shown = secret(path, lambda: mint(secrets.choice).encode()).decode(errors="replace")
    if id_of(shown) is None:
        raise UserError(f"{path} holds no API key: remove it, and the scheduler makes one at its next start")
    return shown


def _folder(auth: AuthConfig) -> Path:
    if not auth.secrets_dir:
        raise UserError("auth.secrets_dir must be set where auth.mode is required: a folder that all processes share")
    return Path(auth.secrets_dir).expanduser()
