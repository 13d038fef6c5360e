"""Secrets that tests give to clusters, and the search for them in all that a cluster leaves and says."""

from __future__ import annotations

import base64
import random
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path

from accounts.keys import ID_CHARACTERS, KEY_CHARACTERS, PREFIX, mint
from scheduler.accounting.secrets_folder import ADMIN_KEY, PEPPER

CANARY = mint(random.Random(17).choice)
"""What clients of the whole suite show where any key is good."""
_KEY = re.compile(rf"\b{PREFIX}[0-9A-Za-z]{{{KEY_CHARACTERS - len(PREFIX)}}}\b")
_BESIDE_CHARACTERS = 200


def keys_in(text: str) -> list[str]:
    """All that has the form of a key."""
    return _KEY.findall(text)


def forms(shown: str) -> set[bytes]:
    """The secret of a key as it is, and as bytes are written elsewhere: base64 at each of its three offsets, too."""
    secret = shown.removeprefix(PREFIX)[ID_CHARACTERS if shown.startswith(PREFIX) else 0 :].encode()
    found = {secret, secret.hex().encode(), secret.hex().upper().encode(), urllib.parse.quote(secret).encode()}
    for offset in range(3):
        whole = base64.b64encode(b"x" * offset + secret)
        # Its first and last characters depend on what stands beside it.
        found.add(whole[4:-4])
        found.add(whole[4:-4].replace(b"+", b"-").replace(b"/", b"_"))
    return found


def assert_absent(secrets: Iterable[str], texts: Mapping[str, bytes]) -> None:
    """No form of any of them is in any text; the error names the text."""
    every = [form for shown in secrets for form in forms(shown)]
    found = {where: _beside(text, form) for where, text in texts.items() for form in every if form in text}
    assert found == {}, found


def assert_in_no_file(state_dir: Path, secrets: Iterable[str] = ()) -> None:
    """Neither these, nor the cluster's own secrets, nor any other key are in a file of its state folder.

    But for the two files that keep its own ones.
    """
    files = [path for path in state_dir.rglob("*") if path.is_file()]
    own = [path for path in files if path.name in (PEPPER, ADMIN_KEY)]
    kept = [path.read_text().strip() for path in own]
    texts = {str(path): path.read_bytes() for path in files if path not in own}
    assert_absent([CANARY, *kept, *secrets], texts)
    others = [where for where, text in texts.items() if keys_in(text.decode(errors="replace"))]
    assert others == [], others


def _beside(text: bytes, form: bytes) -> str:
    at = text.index(form)
    return text[max(0, at - _BESIDE_CHARACTERS) : at + len(form)].decode(errors="replace")
