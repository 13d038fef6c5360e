"""The file that has the key of encrypted segments. Reads it; encrypts nothing."""

from __future__ import annotations

from pathlib import Path

from runtime import secret_file
from runtime.user_error import UserError

KEY_BYTES = 32


def encryption_key(path: str) -> bytes:
    """What a key file holds. Raises ValueError saying what is wrong with it."""
    try:
        text = secret_file.read(Path(path)).decode()
        key = bytes.fromhex(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise ValueError(str(error)) from error
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"{path} must hold {2 * KEY_BYTES} hexadecimal digits, as `openssl rand -hex 32` writes them")
    return key
