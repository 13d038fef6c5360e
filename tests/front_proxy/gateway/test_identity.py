"""The tenant and the class of a request, by headers, metadata and fields. Refused classes: the tests of both APIs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from front_proxy.gateway.identity import (
    ALL_CLASSES,
    Caller,
    caller,
    caller_of_call,
    caller_of_request,
    salt_of_tenant,
    with_class,
)
from front_proxy.grpc_api.client import PriorityClass, request
from runtime.failures import FailureError, FailureKind
from runtime.priority_class import PriorityClass as Class


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], Caller()),
        ([(b"x-baton-tenant", b"team a")], Caller(tenant="name-team a")),
        ([(b"x-baton-tenant", b"x" * 10_000)], Caller(tenant="name-" + "x" * 64)),
        ([(b"x-baton-priority", b"Batch")], Caller(priority_class="batch")),
        ([(b"x-baton-priority", b" ")], Caller()),
        ([(b"authorization", b"Basic abc")], Caller()),
        ([(b"x-slo-ttft-ms", b"1500"), (b"x-slo-tpot-ms", b" 12.5")], Caller(ttft_slo_s=1.5, itl_slo_s=0.0125)),
        ([(b"x-slo-ttft-ms", b"3600000")], Caller(ttft_slo_s=3600.0)),
    ],
)
def test_the_headers_name_the_caller(headers: list[tuple[bytes, bytes]], expected: Caller) -> None:
    assert caller(headers) == expected
    assert caller_of_call((name.decode(), value.decode()) for name, value in headers) == expected
    assert caller_of_call([("trace-bin", b"\x00\xff"), *((n.decode(), v) for n, v in headers)]) == expected


@pytest.mark.parametrize(
    ("allowed", "named", "priority", "expected"),
    [
        (ALL_CLASSES, "", -5, ""),
        (ALL_CLASSES, "batch", -5, "batch"),
        ((Class.BATCH,), "", 0, "batch"),
        ((Class.BATCH,), "", 7, ""),
        ((Class.INTERACTIVE, Class.BATCH), "", 0, "interactive"),
        ((Class.INTERACTIVE, Class.BATCH), "batch", 0, "batch"),
    ],
)
def test_a_request_that_asks_for_no_class_is_in_one_that_is_allowed(
    allowed: Sequence[Class], named: str, priority: int, expected: str
) -> None:
    asked = Caller(tenant="name-a", priority_class=named)
    assert with_class(asked, priority, allowed) == Caller(tenant="name-a", priority_class=expected)


def test_a_key_is_told_apart_but_not_told_and_goes_before_a_name() -> None:
    named = (b"x-baton-tenant", b"team a")
    one = caller([(b"authorization", b"Bearer secret-1"), named])
    same, other = caller([(b"x-api-key", b"secret-1")]), caller([(b"authorization", b"bearer secret-2")])
    assert one.tenant == same.tenant != other.tenant
    assert "secret" not in one.tenant and one.tenant.startswith("key-")


@pytest.mark.parametrize(
    ("call", "tenant", "priority_class", "expected"),
    [
        (Caller(tenant="name-a", priority_class="batch"), "", None, Caller(tenant="name-a", priority_class="batch")),
        (Caller(tenant="name-a", priority_class="batch"), "b", None, Caller(tenant="name-b", priority_class="batch")),
        (Caller(), "ü", "interactive", Caller(tenant="name-ü", priority_class="interactive")),
        (Caller(tenant="key-1"), "b", "batch", Caller(tenant="key-1", priority_class="batch")),
    ],
)
def test_a_requests_fields_go_before_its_call_but_not_before_a_key(
    call: Caller, tenant: str, priority_class: PriorityClass | None, expected: Caller
) -> None:
    assert caller_of_request(call, request("x", tenant=tenant, priority_class=priority_class)) == expected


NO_TIMES = ["", "soon", "0", "-1", "nan", "inf", "3600001", "1,5"]


@pytest.mark.parametrize("value", NO_TIMES)
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
def test_a_time_that_is_none_is_refused_by_the_name_of_its_header(name: str, value: str) -> None:
    with pytest.raises(FailureError) as refused:
        caller([(name.encode(), value.encode())])
    assert refused.value.failure.kind is FailureKind.BAD_REQUEST
    assert str(refused.value).startswith(f"{name} must be a number of milliseconds above 0")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 3_600_001.0])
@pytest.mark.parametrize("name", ["ttft_slo_ms", "tpot_slo_ms"])
def test_a_time_that_is_none_is_refused_by_the_name_of_its_field(name: str, value: float) -> None:
    asked = request("x")
    setattr(asked, name, value)
    with pytest.raises(FailureError, match=f"^{name} must be a number of milliseconds above 0"):
        caller_of_request(Caller(), asked)


def test_a_requests_times_go_before_its_calls_each_by_itself() -> None:
    call = Caller(tenant="name-a", ttft_slo_s=2.0, itl_slo_s=0.05)
    assert caller_of_request(call, request("x")) == call
    named = caller_of_request(call, request("x", tpot_slo_ms=20.0, tenant="b"))
    assert named == Caller(tenant="name-b", ttft_slo_s=2.0, itl_slo_s=0.02)
    assert caller_of_request(Caller(), request("x", ttft_slo_ms=1.0)) == Caller(ttft_slo_s=0.001)


def test_no_tenant_can_choose_a_salt_that_is_anothers() -> None:
    cases = [("", ""), ("a", ""), ("", "a"), ("a", "b"), ("ab", ""), ("", "ab"), ("a", "\0b")]
    assert len({salt_of_tenant(tenant, salt) for tenant, salt in cases}) == len(cases)
    assert salt_of_tenant("a", "b") == salt_of_tenant("a", "b")
