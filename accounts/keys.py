"""The form of API keys: ``bt-<id 10><secret 32><check 6>`` in base 62. Stores nothing and shows no secret.

The id is public: logs, records and errors name it. The secret has 190 bits of chance, so its digest needs no slow
function: no table of guesses holds it. The check finds typing errors, and lets scanners find leaked keys.
"""

from __future__ import annotations

import hashlib
import string
import zlib
from collections.abc import Callable

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
PREFIX = "bt-"
ID_CHARACTERS, SECRET_CHARACTERS, CHECK_CHARACTERS = 10, 32, 6
KEY_CHARACTERS = len(PREFIX) + ID_CHARACTERS + SECRET_CHARACTERS + CHECK_CHARACTERS
_BODY_END = KEY_CHARACTERS - CHECK_CHARACTERS
_ID_END = len(PREFIX) + ID_CHARACTERS
DIGEST_BYTES = 32


def mint(choose: Callable[[str], str], key_id: str = "") -> str:
    """A new key. ``choose`` draws one character by chance. ``key_id``: of an older key that it takes over from."""
    key_id = key_id or "".join(choose(ALPHABET) for _ in range(ID_CHARACTERS))
    body = PREFIX + key_id + "".join(choose(ALPHABET) for _ in range(SECRET_CHARACTERS))
    return body + check_of(body)


def check_of(body: str) -> str:
    """The last characters of a key that begins with ``body``: its CRC-32 in base 62."""
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECK_CHARACTERS):
        number, digit = divmod(number, len(ALPHABET))
        digits += ALPHABET[digit]
    return digits


def named_id(key: str) -> str | None:
    """The public id in what has the form of a key, its check not looked at; None: it has not."""
    if len(key) != KEY_CHARACTERS or not key.startswith(PREFIX) or not key.isascii():
        return None
    return key[len(PREFIX) : _ID_END]


def id_of(key: str) -> str | None:
    """The public id of what has the form of a key; None: it has not."""
    key_id = named_id(key)
    return key_id if key_id is not None and check_of(key[:_BODY_END]) == key[_BODY_END:] else None


def digest_of(key: str, pepper: bytes) -> bytes:
    """What is kept of a key: BLAKE2b under the pepper, 32 bytes. Without that a stolen table is of no use."""
    mac = mac_of(pepper)
    mac.update(key.encode())
    return mac.digest()


def mac_of(pepper: bytes) -> hashlib.blake2b:
    """A digest that is begun: of many keys each takes a copy.

    HMAC-SHA256 took a front proxy 38 us a request: all of OpenSSL has left the caches by then.
    """
    fits = len(pepper) <= hashlib.blake2b.MAX_KEY_SIZE
    return hashlib.blake2b(key=pepper if fits else hashlib.blake2b(pepper).digest(), digest_size=DIGEST_BYTES)
