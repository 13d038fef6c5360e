"""Who asks, by the headers."""

from __future__ import annotations

import pytest

from front_proxy.tenancy import Asker, asker


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], Asker()),
        ([(b"x-baton-tenant", b"team a")], Asker(tenant="name-team a")),
        ([(b"x-baton-priority", b"Batch")], Asker(priority_class="batch")),
        ([(b"x-baton-priority", b"at once")], Asker()),
        ([(b"authorization", b"Basic abc")], Asker()),
    ],
)
def test_the_headers_say_who_asks(headers: list[tuple[bytes, bytes]], expected: Asker) -> None:
    assert asker(headers) == expected


def test_a_key_is_told_apart_but_not_told_and_goes_before_a_name() -> None:
    key = [(b"authorization", b"Bearer secret-1"), (b"x-baton-tenant", b"somebody")]
    one, same, other = asker(key), asker([(b"x-api-key", b"secret-1")]), asker([(b"authorization", b"bearer secret-2")])
    assert one.tenant == same.tenant != other.tenant
    assert "secret" not in one.tenant and one.tenant.startswith("key-")


def test_a_name_is_bounded() -> None:
    assert len(asker([(b"x-baton-tenant", b"x" * 10_000)]).tenant) < 100
