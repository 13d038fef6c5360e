"""AccountsService over real gRPC: who may ask, and what is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from accounts.config import AccountsConfig, AuthConfig
from protos.accounts.v1 import accounts_pb2 as pb
from protos.accounts.v1 import accounts_pb2_grpc
from runtime.rpc.grpc_server import channel, start_server
from scheduler.accounting.accounting import accounting_of
from scheduler.accounting.secrets_folder import admin_key
from scheduler.accounting.service import AccountsService

Metadata = Sequence[tuple[str, str]]


def _never(_what: object) -> None:
    raise AssertionError("nothing is asked")


class Asked:
    def __init__(self, stub: Any, admin: Metadata, accounting: Any) -> None:
        self.stub, self.admin, self.accounting = stub, admin, accounting


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, auth: AuthConfig, accounts: AccountsConfig) -> AsyncIterator[Asked]:
    accounting = accounting_of(
        auth, accounts, lambda _session, _reply: None, place=_never, answer=_never, lost=asyncio.Event()
    )
    assert accounting is not None
    await accounting.open(0)

    def add(server: Any) -> Sequence[str]:
        accounts_pb2_grpc.add_AccountsServiceServicer_to_server(AccountsService(accounting, lambda: True), server)
        return ("baton.accounts.v1.AccountsService",)

    server = await start_server("127.0.0.1", 0, add, message_bytes_max=1 << 20)
    shown = admin_key(auth) if auth.mode == "required" else ""
    try:
        async with channel(server.address, 1 << 20) as opened:
            stub: Any = accounts_pb2_grpc.AccountsServiceStub(opened)
            yield Asked(stub, (("authorization", f"Bearer {shown}"),), accounting)
    finally:
        await server.stop(0.1)
        await accounting.close()


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[Asked]:
    auth = AuthConfig(mode="required", secrets_dir=str(tmp_path / "secrets"), keys_max_age_s=0.2)
    async with serving(tmp_path, auth, AccountsConfig(ledger_file=str(tmp_path / "ledger.sqlite"))) as it:
        yield it


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_a_key_is_made_listed_rotated_and_revoked_and_each_is_audited(asked: Asked) -> None:
    made = await asked.stub.CreateKey(
        pb.CreateKeyRequest(
            team="search",
            name="ci",
            classes=["batch"],
            budgets=["50/month"],
            limits=["requests_per_minute=60"],
            expires_in_s=60,
        ),
        metadata=asked.admin,
    )
    again = await asked.stub.RotateKey(pb.RotateKeyRequest(key_id=made.key_id, overlap_s=60), metadata=asked.admin)
    assert again.key != made.key and again.key_id == made.key_id
    done = await asked.stub.RevokeKey(pb.RevokeKeyRequest(key_id=made.key_id), metadata=asked.admin)
    assert not done.told and not done.not_reached
    listed = (await asked.stub.ListKeys(pb.ListKeysRequest(), metadata=asked.admin)).keys
    (key,) = [each for each in listed if each.team]
    assert (key.team, key.name, list(key.classes), key.revoked) == ("search", "ci", ["batch"], True)
    assert (list(key.budgets), list(key.limits)) == (["50/month"], ["requests_per_minute=60"])
    assert key.expires_at_s > key.created_at_s and key.created_by == next(e.key_id for e in listed if not e.team)
    rows = [
        row async for page in asked.stub.ExportAudit(pb.ExportAuditRequest(), metadata=asked.admin) for row in page.rows
    ]
    assert len(rows) == 3
    told = b"".join(rows) + str(listed).encode()
    for secret in (made.key, again.key):
        assert secret[13:].encode() not in told


async def test_only_an_administrators_key_may_ask(asked: Asked) -> None:
    made = await asked.stub.CreateKey(pb.CreateKeyRequest(team="search"), metadata=asked.admin)
    own = (("authorization", f"Bearer {made.key}"),)
    assert (await refused(asked.stub.ListKeys(pb.ListKeysRequest())))[0] is grpc.StatusCode.UNAUTHENTICATED
    code, text = await refused(asked.stub.ListKeys(pb.ListKeysRequest(), metadata=own))
    assert code is grpc.StatusCode.PERMISSION_DENIED and made.key_id in text and made.key[13:] not in text


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "team must be set"),
        ({"team": "a", "scopes": ["all"]}, "scopes"),
        ({"team": "a", "classes": ["urgent"]}, "urgent"),
        ({"team": "a", "budgets": ["50/year"]}, "such as 50/month"),
        ({"team": "a", "limits": ["speed=1"]}, "such as requests_per_minute=60"),
        ({"team": "a\n"}, "team must be printable"),
        ({"team": "a", "name": "x" * 201}, "name must be printable"),
        ({"team": "a b"}, "a team's name has letters"),
        ({"team": "a", "models": [""]}, "models must be patterns"),
        ({"team": "a", "expires_in_s": -1.0}, "expires_in_s must be between"),
    ],
)
async def test_a_bad_wish_gets_a_sentence_that_names_it(asked: Asked, fields: dict[str, Any], why: str) -> None:
    code, text = await refused(asked.stub.CreateKey(pb.CreateKeyRequest(**fields), metadata=asked.admin))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and why in text


async def test_a_key_that_is_not_there_is_not_found(asked: Asked) -> None:
    for call in (asked.stub.RevokeKey(pb.RevokeKeyRequest(key_id="x"), metadata=asked.admin),):
        assert (await refused(call))[0] is grpc.StatusCode.NOT_FOUND


async def test_a_revoked_key_gets_no_other_secret(asked: Asked) -> None:
    made = await asked.stub.CreateKey(pb.CreateKeyRequest(team="a"), metadata=asked.admin)
    await asked.stub.RevokeKey(pb.RevokeKeyRequest(key_id=made.key_id), metadata=asked.admin)
    code, text = await refused(asked.stub.RotateKey(pb.RotateKeyRequest(key_id=made.key_id), metadata=asked.admin))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "was revoked" in text
