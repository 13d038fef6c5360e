"""Who asks, by the headers."""

from __future__ import annotations

import pytest

from front_proxy.gateway.identity import Asker, asker, asker_of_call, asker_of_request
from runtime.failures import FailureError


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], Asker()),
        ([(b"x-baton-tenant", b"team a")], Asker(tenant="name-team a")),
        ([(b"x-baton-priority", b"Batch")], Asker(priority_class="batch")),
        ([(b"x-baton-priority", b" ")], Asker()),
        ([(b"authorization", b"Basic abc")], Asker()),
    ],
)
def test_the_headers_say_who_asks(headers: list[tuple[bytes, bytes]], expected: Asker) -> None:
    assert asker(headers) == expected


def test_a_class_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        FailureError, match="x-baton-priority must be one of interactive, default, batch, got 'at once'"
    ):
        asker([(b"x-baton-priority", b"at once")])


def test_a_key_is_told_apart_but_not_told_and_goes_before_a_name() -> None:
    key = [(b"authorization", b"Bearer secret-1"), (b"x-baton-tenant", b"somebody")]
    one, same, other = asker(key), asker([(b"x-api-key", b"secret-1")]), asker([(b"authorization", b"bearer secret-2")])
    assert one.tenant == same.tenant != other.tenant
    assert "secret" not in one.tenant and one.tenant.startswith("key-")


def test_a_name_is_bounded() -> None:
    assert len(asker([(b"x-baton-tenant", b"x" * 10_000)]).tenant) < 100


def test_metadata_of_a_call_says_what_the_headers_say() -> None:
    call = asker_of_call([("x-baton-tenant", "team a"), ("x-baton-priority", "batch"), ("trace-bin", b"\x00\xff")])
    assert call == asker([(b"x-baton-tenant", b"team a"), (b"x-baton-priority", b"batch")])
    assert asker_of_call([("x-api-key", "secret-1")]) == asker([(b"authorization", b"Bearer secret-1")])


@pytest.mark.parametrize(
    ("call", "tenant", "priority_class", "expected"),
    [
        (Asker(), "", "", Asker()),
        (Asker(tenant="name-a", priority_class="batch"), "", "", Asker(tenant="name-a", priority_class="batch")),
        (Asker(tenant="name-a", priority_class="batch"), "b", "", Asker(tenant="name-b", priority_class="batch")),
        (
            Asker(),
            "ü",
            "interactive",
            asker([(b"x-baton-tenant", "ü".encode()), (b"x-baton-priority", b"interactive")]),
        ),
        (Asker(tenant="key-1"), "b", "batch", Asker(tenant="key-1", priority_class="batch")),
    ],
)
def test_a_request_goes_before_its_call_but_not_before_a_key(
    call: Asker, tenant: str, priority_class: str, expected: Asker
) -> None:
    assert asker_of_request(call, tenant=tenant, priority_class=priority_class) == expected
