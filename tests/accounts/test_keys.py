"""The form of keys, what is kept of them, and what the table says of a key that is shown."""

from __future__ import annotations

import base64
import random
import string
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.key_table import Denied, Key, KeyTable
from accounts.keys import KEY_CHARACTERS, digest_of, id_of, mint
from tests.e2e.accounts import canary

PEPPER = b"pepper"
RNG = random.Random(0)
SHOWN = mint(RNG.choice)


def row(shown: str = SHOWN, /, **facts: Any) -> Key:
    key_id = id_of(shown)
    assert key_id is not None
    return msgspec.structs.replace(Key(key_id=key_id, digest=digest_of(shown, PEPPER), team="search"), **facts)


def found(key: Key, shown: str = SHOWN, now_s: float = 100.0) -> Key | Denied:
    return KeyTable([key], 1, PEPPER).find(shown.encode(), now_s)


@given(st.integers(0, KEY_CHARACTERS - 1), st.sampled_from(string.ascii_letters + string.digits))
def test_a_typing_error_is_noticed_without_the_table(at: int, character: str) -> None:
    typed = SHOWN[:at] + character + SHOWN[at + 1 :]
    assert typed == SHOWN or id_of(typed) is None


@given(st.text(max_size=80))
def test_what_is_no_key_has_no_id(text: str) -> None:
    assert id_of(text) is None


def test_every_byte_of_a_pepper_counts_also_of_one_longer_than_the_digest_takes() -> None:
    peppers = (PEPPER, b"p" * 64, b"p" * 65, b"p" * 200, b"p" * 199 + b"q")
    assert len({digest_of(SHOWN, pepper) for pepper in peppers}) == len(peppers)
    key = row(digest=digest_of(SHOWN, peppers[-1]))
    assert KeyTable([key], 1, peppers[-1]).find(SHOWN.encode(), 100.0) == key
    assert KeyTable([key], 1, peppers[-2]).find(SHOWN.encode(), 100.0) is Denied.UNKNOWN


def test_a_key_is_found_by_its_secret_alone() -> None:
    other = mint(RNG.choice, id_of(SHOWN) or "")
    assert found(row()) == row()
    assert found(row(), other) is Denied.UNKNOWN
    assert found(row(), mint(RNG.choice)) is Denied.UNKNOWN
    assert found(row(), "") is Denied.MISSING
    assert found(row(), digest_of(SHOWN, PEPPER).hex()) is Denied.MALFORMED


@pytest.mark.parametrize(
    ("facts", "now_s", "denied"),
    [
        ({"revoked": True}, 100.0, Denied.REVOKED),
        ({"expires_at_s": 100.0}, 100.0, Denied.EXPIRED),
        ({"expires_at_s": 100.5}, 100.0, None),
    ],
)
def test_a_key_holds_for_its_time(facts: dict[str, Any], now_s: float, denied: Denied | None) -> None:
    assert found(row(**facts), now_s=now_s) == (denied or row(**facts))


def test_of_a_rotated_key_the_old_secret_holds_for_a_while() -> None:
    new = mint(RNG.choice, id_of(SHOWN) or "")
    rotated = row(new, old_digest=row().digest, old_until_s=200.0)
    assert found(rotated, new, 300.0) == rotated
    assert found(rotated, SHOWN, 199.0) == rotated
    assert found(rotated, SHOWN, 200.0) is Denied.EXPIRED


def test_nothing_of_a_key_is_shown_but_its_id() -> None:
    key = row(old_digest=b"old secret digest")
    for text in (repr(key), f"{key}", repr(KeyTable([key], 1, PEPPER)), repr([key])):
        assert SHOWN[13:] not in text
        for digest in (key.digest, key.old_digest):
            assert digest.hex() not in text and repr(digest)[2:-1] not in text


def test_a_key_may_use_the_models_that_its_patterns_name() -> None:
    key = row(models=("demo*", "other"))
    assert [name for name in ("demo", "demo-2", "other", "other-2", "Demo") if key.allows_model(name)] == [
        "demo",
        "demo-2",
        "other",
    ]


@pytest.mark.parametrize("offset", range(3))
def test_the_search_of_the_suite_finds_a_key_in_every_form(offset: int, tmp_path: Path) -> None:
    shown = canary.CANARY.encode()
    for text in (shown, shown.hex().encode(), base64.b64encode(b"x" * offset + shown), b"?key=" + shown):
        (tmp_path / "a.log").write_bytes(b"some text " + text + b" and more")
        with pytest.raises(AssertionError, match=r"a\.log"):
            canary.assert_in_no_file(tmp_path)
    (tmp_path / "a.log").write_text(mint(random.Random(5).choice))
    with pytest.raises(AssertionError, match=r"a\.log"):
        canary.assert_in_no_file(tmp_path)
