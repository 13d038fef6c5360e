"""AccountsService: what operators ask of the leader about keys, usage and audit. Checks their key; decides nothing."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import msgspec
import structlog

from accounts import rules
from accounts.audit import AuditRow
from accounts.key_table import DEFAULT_SCOPES, Key, KeyScope
from protos.accounts.v1 import accounts_pb2 as pb
from protos.accounts.v1 import accounts_pb2_grpc
from runtime.failures import Failure, FailureError, FailureKind
from runtime.priority_class import PriorityClass
from runtime.rpc.grpc_errors import abort
from scheduler.accounting.accounting import Accounting
from scheduler.accounting.keys_desk import KeysDesk
from scheduler.accounting.ledger import LedgerLost

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
ROWS_MAX = 500
"""Rows of one message of a stream."""
OVERLAP_S_MAX = 30 * 86_400.0
_TEXT_CHARACTERS_MAX = 200


class AccountsService(accounts_pb2_grpc.AccountsServiceServicer):
    """Over the accounting of one scheduler. ``leads``: whether it may answer."""

    def __init__(self, accounting: Accounting, leads: Callable[[], bool]) -> None:
        self._accounting = accounting
        self._leads = leads

    async def ListKeys(self, _request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:  # noqa: N802
        """Every key."""

        async def answer(_actor: str) -> pb.ListKeysResponse:
            return pb.ListKeysResponse(keys=[_told(key) for key in self._keys.table.keys.values()])

        return await self._answered(context, answer)

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.KeySecret:  # noqa: N802
        """Make a key."""

        async def answer(actor: str) -> pb.KeySecret:
            now_s = time.time()
            key = self._asked_for(request, now_s)
            key_id, shown = await self._keys.create(key, actor, now_s)
            log.info("API key created", key=key_id, team=key.team, by=actor)
            return pb.KeySecret(key_id=key_id, key=shown)

        return await self._answered(context, answer)

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Context) -> pb.KeySecret:  # noqa: N802
        """Give a key another secret."""

        async def answer(actor: str) -> pb.KeySecret:
            if not 0 <= request.overlap_s <= OVERLAP_S_MAX:
                raise bad(f"overlap_s must be between 0 and {OVERLAP_S_MAX:g}, got {request.overlap_s:g}")
            shown = await self._keys.rotate(request.key_id, request.overlap_s, actor, time.time())
            log.info("API key rotated", key=request.key_id, by=actor)
            return pb.KeySecret(key_id=request.key_id, key=shown)

        return await self._answered(context, answer)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:  # noqa: N802
        """End a key."""

        async def answer(actor: str) -> pb.RevokeKeyResponse:
            began_s = time.monotonic()
            told, not_reached = await self._keys.revoke(request.key_id, actor, time.time())
            waited_s = time.monotonic() - began_s
            log.info("API key revoked", key=request.key_id, by=actor, not_reached=list(not_reached))
            return pb.RevokeKeyResponse(told=told, not_reached=not_reached, waited_s=waited_s)

        return await self._answered(context, answer)

    async def ExportAudit(  # noqa: N802 - gRPC's name
        self, _request: pb.ExportAuditRequest, context: Context
    ) -> AsyncIterator[pb.AuditRows]:
        """Every audited change."""
        last = 0

        async def page(_actor: str) -> list[AuditRow]:
            return await self._accounting.books.call(lambda ledger: ledger.audit_rows(last, ROWS_MAX))

        while rows := await self._answered(context, page):
            last = rows[-1].seq
            yield pb.AuditRows(rows=[msgspec.msgpack.encode(row) for row in rows])

    @property
    def _keys(self) -> KeysDesk:
        if self._accounting.keys is None:
            raise bad("auth.mode is off: there are no keys")
        return self._accounting.keys

    async def _answered(self, context: Context, answer: Callable[[str], Awaitable[T]]) -> T:
        """What ``answer`` gives, which is told the id of the caller's key. Ends the call where it fails."""
        try:
            return await answer(self._caller(context, "admin").key_id)
        except FailureError as error:
            await abort(context, error.failure)
        except (sqlite3.Error, LedgerLost) as error:
            message = f"The ledger {self._accounting.books.path} does not answer: {error}"
            await abort(context, Failure(kind=FailureKind.UNAVAILABLE, message=message))

    def _caller(self, context: Context, *scopes: KeyScope) -> Key:
        """The caller's key, with one of these scopes. Where keys are not required, one that may do all."""
        if not self._leads():
            message = "This scheduler stands by: another one leads."
            raise FailureError(Failure(kind=FailureKind.UNAVAILABLE, message=message))
        if self._accounting.keys is None:
            return Key(key_id="", digest=b"", team="", scopes=("admin",))
        shown = ""
        for name, value in context.invocation_metadata() or ():
            if name == "authorization" and isinstance(value, str) and value[:7].lower() == "bearer ":
                shown = value[7:].strip()
        key = self._accounting.keys.caller(shown, time.time())
        if not set(scopes) & set(key.scopes):
            message = f"API key {key.key_id} lacks the scope {' or '.join(scopes)}."
            raise FailureError(Failure(kind=FailureKind.FORBIDDEN, message=message))
        return key

    def _asked_for(self, request: pb.CreateKeyRequest, now_s: float) -> Key:
        """The rights of a new key. Raises FailureError that names the field."""
        for field in ("team", "name", "models"):
            value = getattr(request, field)
            for each in [value] if isinstance(value, str) else value:
                if len(each) > _TEXT_CHARACTERS_MAX or not each.isprintable():
                    raise bad(f"{field} must be printable, of at most {_TEXT_CHARACTERS_MAX} characters")
        scopes = tuple(request.scopes) or DEFAULT_SCOPES
        if not request.team and scopes != ("admin",):
            raise bad("team must be set: a key acts for a team")
        try:
            limits = rules.limits_of(request.budgets, request.limits)
            classes = tuple(PriorityClass(each) for each in request.classes) or tuple(PriorityClass)
            return msgspec.convert(
                {
                    "key_id": "",
                    "digest": b"",
                    "team": request.team,
                    "name": request.name,
                    "scopes": scopes,
                    "models": tuple(request.models) or ("*",),
                    "classes": classes,
                    "limits": limits,
                    "expires_at_s": now_s + request.expires_in_s if request.expires_in_s > 0 else 0.0,
                },
                Key,
            )
        except (ValueError, msgspec.ValidationError) as error:
            raise bad(str(error)) from None


def bad(message: str) -> FailureError:
    """A request that cannot be served as it is."""
    return FailureError(Failure(kind=FailureKind.BAD_REQUEST, message=message))


def _told(key: Key) -> pb.Key:
    rates = (f"{name}={value}" for name in rules.RATES if (value := getattr(key.limits, name)) is not None)
    return pb.Key(
        key_id=key.key_id,
        team=key.team,
        name=key.name,
        scopes=key.scopes,
        models=key.models,
        classes=key.classes,
        budgets=[rules.budget_text(each) for each in key.limits.budgets],
        limits=list(rates),
        expires_at_s=key.expires_at_s,
        revoked=key.revoked,
        created_by=key.created_by,
        created_at_s=key.created_at_s,
        old_until_s=key.old_until_s,
    )
