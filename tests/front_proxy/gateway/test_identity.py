"""Who asks, by the headers."""

from __future__ import annotations

import pytest

from front_proxy.gateway.identity import Caller, caller, caller_of_call, caller_of_request
from runtime.failures import FailureError


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], Caller()),
        ([(b"x-baton-tenant", b"team a")], Caller(tenant="name-team a")),
        ([(b"x-baton-priority", b"Batch")], Caller(priority_class="batch")),
        ([(b"x-baton-priority", b" ")], Caller()),
        ([(b"authorization", b"Basic abc")], Caller()),
    ],
)
def test_the_headers_say_who_asks(headers: list[tuple[bytes, bytes]], expected: Caller) -> None:
    assert caller(headers) == expected


def test_a_class_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        FailureError, match="x-baton-priority must be one of interactive, default, batch, got 'at once'"
    ):
        caller([(b"x-baton-priority", b"at once")])


def test_a_key_is_told_apart_but_not_told_and_goes_before_a_name() -> None:
    key = [(b"authorization", b"Bearer secret-1"), (b"x-baton-tenant", b"somebody")]
    one, same, other = (
        caller(key),
        caller([(b"x-api-key", b"secret-1")]),
        caller([(b"authorization", b"bearer secret-2")]),
    )
    assert one.tenant == same.tenant != other.tenant
    assert "secret" not in one.tenant and one.tenant.startswith("key-")


def test_a_name_is_bounded() -> None:
    assert len(caller([(b"x-baton-tenant", b"x" * 10_000)]).tenant) < 100


def test_metadata_of_a_call_says_what_the_headers_say() -> None:
    call = caller_of_call([("x-baton-tenant", "team a"), ("x-baton-priority", "batch"), ("trace-bin", b"\x00\xff")])
    assert call == caller([(b"x-baton-tenant", b"team a"), (b"x-baton-priority", b"batch")])
    assert caller_of_call([("x-api-key", "secret-1")]) == caller([(b"authorization", b"Bearer secret-1")])


@pytest.mark.parametrize(
    ("call", "tenant", "priority_class", "expected"),
    [
        (Caller(), "", "", Caller()),
        (Caller(tenant="name-a", priority_class="batch"), "", "", Caller(tenant="name-a", priority_class="batch")),
        (Caller(tenant="name-a", priority_class="batch"), "b", "", Caller(tenant="name-b", priority_class="batch")),
        (
            Caller(),
            "ü",
            "interactive",
            caller([(b"x-baton-tenant", "ü".encode()), (b"x-baton-priority", b"interactive")]),
        ),
        (Caller(tenant="key-1"), "b", "batch", Caller(tenant="key-1", priority_class="batch")),
    ],
)
def test_a_request_goes_before_its_call_but_not_before_a_key(
    call: Caller, tenant: str, priority_class: str, expected: Caller
) -> None:
    assert caller_of_request(call, tenant=tenant, priority_class=priority_class) == expected
