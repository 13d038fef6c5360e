"""A secret is made once, and only its owner may read it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from runtime.secret_file import secret
from runtime.user_error import UserError


def test_whoever_comes_first_makes_it_and_all_read_the_same(tmp_path: Path) -> None:
    numbers = count()
    path = tmp_path / "below" / "secret"
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: secret(path, lambda: b"%d" % next(numbers)), range(32)))
    assert set(found) == {path.read_bytes()}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["secret"]


@pytest.mark.parametrize(("mode", "text", "why"), [(0o644, "s", "read by others"), (0o600, " \n", "is empty")])
def test_a_secret_that_is_none_gets_a_sentence_with_its_path(tmp_path: Path, mode: int, text: str, why: str) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(UserError, match=why) as caught:
        secret(path, lambda: b"x")
    assert str(path) in str(caught.value)
