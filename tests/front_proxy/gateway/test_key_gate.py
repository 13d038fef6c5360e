"""Who is let in, with what; K3: the model that serves decides, whatever it is called."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from accounts.key_table import Key
from accounts.keys import digest_of, id_of, mint
from front_proxy.gateway.identity import caller, caller_of_call, caller_of_request, with_class
from front_proxy.gateway.key_gate import KeyGate
from front_proxy.grpc_api.client import request
from front_proxy.planning.key_watch import KeyWatch
from runtime.failures import FailureError, FailureKind
from runtime.priority_class import PriorityClass as Class

PEPPER = b"pepper"
RNG = random.Random(0)


class Clock:
    now_s = 0.0


def gate(*rows: Key) -> tuple[KeyGate, Clock]:
    clock = Clock()
    watch = KeyWatch(pepper=PEPPER, max_age_s=10.0)
    watch.hear(2, watch.ask(0.0)[1], msgspec.msgpack.encode(list(rows)))
    made = KeyGate(
        watch,
        model="demo",
        now_s=lambda: clock.now_s,
        wall_s=lambda: 1_000.0,
    )
    return made, clock


def key(**facts: Any) -> tuple[str, Key]:
    shown = mint(RNG.choice)
    row = Key(key_id=id_of(shown) or "", digest=digest_of(shown, PEPPER), team="search")
    return shown, msgspec.structs.replace(row, **facts)


def failure(of: KeyGate, shown: str, scope: Any = "inference") -> tuple[FailureKind, str, str]:
    with pytest.raises(FailureError) as caught:
        of.admit(shown.encode(), scope)
    failed = caught.value.failure
    return failed.kind, failed.code, failed.message


def test_a_key_is_let_in_for_what_it_may_do() -> None:
    shown, row = key()
    one, _ = gate(row)
    assert one.admit(shown.encode(), "inference") == row == one.admit(shown.encode(), None)
    assert failure(one, shown, "admin")[:2] == (FailureKind.FORBIDDEN, "")
    kind, code, message = failure(one, "")
    assert (kind, code) == (FailureKind.UNAUTHENTICATED, "invalid_api_key") and "Bearer" in message


def test_nothing_of_a_wrong_key_is_told_but_that_it_is_wrong() -> None:
    shown, row = key(revoked=True)
    one, _ = gate(row)
    for wrong in (shown, mint(RNG.choice), "bt-" + "x" * 48, "sk-1234567890abcdefgh"):
        assert wrong not in failure(one, wrong)[2] and wrong[13:] not in failure(one, wrong)[2]


def test_a_table_that_is_too_old_lets_none_in() -> None:
    shown, row = key()
    one, clock = gate(row)
    clock.now_s = 10.0
    assert failure(one, shown)[0] is FailureKind.UNAVAILABLE


@pytest.mark.parametrize(("models", "allowed"), [(("demo",), True), (("de*", "x"), True), (("alias-of-demo",), False)])
def test_the_model_that_serves_must_be_allowed(models: tuple[str, ...], allowed: bool) -> None:
    shown, row = key(models=models)
    one, _ = gate(row)
    if allowed:
        assert one.admit(shown.encode(), "inference") == row
    else:
        assert failure(one, shown)[0] is FailureKind.FORBIDDEN
        assert one.admit(shown.encode(), None) == row


def test_the_team_of_a_key_is_the_tenant_whatever_else_is_said() -> None:
    shown, row = key()
    one, _ = gate(row)
    headers = [(b"authorization", f"Bearer {shown}".encode()), (b"x-baton-tenant", b"other")]
    assert caller(headers, gate=one).tenant == "search"
    assert caller([(b"x-api-key", shown.encode())], gate=one).key == row
    call = caller_of_call([("authorization", f"Bearer {shown}")], gate=one)
    assert caller_of_request(call, request("x", tenant="other")).tenant == "search"


def test_a_class_that_a_key_may_not_use_is_forbidden_and_one_that_is_none_is_bad() -> None:
    shown, row = key(classes=(Class.BATCH,))
    one, _ = gate(row)
    bearer = (b"authorization", f"Bearer {shown}".encode())
    for named, kind in ((b"interactive", FailureKind.FORBIDDEN), (b"urgent", FailureKind.BAD_REQUEST)):
        with pytest.raises(FailureError) as caught:
            caller([bearer, (b"x-baton-priority", named)], gate=one)
        assert caught.value.failure.kind is kind
    call = caller([bearer], gate=one)
    assert with_class(call, 0, tuple(Class)).priority_class == "batch", "its first one"
    with pytest.raises(FailureError) as caught:
        with_class(call, -1, tuple(Class))
    assert caught.value.failure.kind is FailureKind.FORBIDDEN
    with pytest.raises(FailureError) as caught:
        caller_of_request(call, request("x", priority_class="interactive"))
    assert caught.value.failure.kind is FailureKind.FORBIDDEN
