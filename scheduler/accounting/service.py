"""AccountsService: what operators ask of the leader about keys, usage and audit. Checks their key; decides nothing."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar, get_args

import grpc
import msgspec
import structlog

from accounts import rules
from accounts.audit import AuditRow
from accounts.key_table import DEFAULT_SCOPES, Key, KeyScope
from accounts.usage import UsageRecord
from protos.accounts.v1 import accounts_pb2 as pb
from protos.accounts.v1 import accounts_pb2_grpc
from runtime.configuration import BadConfiguration
from runtime.failures import Failure, FailureError, FailureKind
from runtime.priority_class import PriorityClass
from runtime.rpc.grpc_errors import abort
from scheduler.accounting.accounting import Accounting
from scheduler.accounting.keys_desk import KeysDesk
from scheduler.accounting.ledger import GROUPS, SUMMED, LedgerLost
from scheduler.accounting.usage_desk import UsageDesk

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
ROWS_MAX = 500
"""Rows of one message of a stream."""
OVERLAP_S_MAX = 30 * 86_400.0
EXPIRES_IN_S_MAX = 100 * 365 * 86_400.0
_TEXT_CHARACTERS_MAX = 200
_SUM_FIELDS = {"amount": "amount_nano"}


class AccountsService(accounts_pb2_grpc.AccountsServiceServicer):
    """Over the accounting of one scheduler. ``leads``: whether it may answer."""

    def __init__(self, accounting: Accounting, leads: Callable[[], bool]) -> None:
        self._accounting = accounting
        self._leads = leads

    async def ListKeys(self, _request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:  # noqa: N802
        """Every key."""

        async def answer(_caller: Key) -> pb.ListKeysResponse:
            return pb.ListKeysResponse(keys=[_told(key) for key in self._keys.table.keys.values()])

        return await self._answered(context, answer)

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.KeySecret:  # noqa: N802
        """Make a key."""

        async def answer(caller: Key) -> pb.KeySecret:
            now_s = time.time()
            key = self._asked_for(request, now_s)
            key_id, shown = await self._keys.create(key, caller.key_id, now_s)
            log.info("API key created", key=key_id, team=key.team, by=caller.key_id)
            return pb.KeySecret(key_id=key_id, key=shown)

        return await self._answered(context, answer)

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Context) -> pb.KeySecret:  # noqa: N802
        """Give a key another secret."""

        async def answer(caller: Key) -> pb.KeySecret:
            if not 0 <= request.overlap_s <= OVERLAP_S_MAX:
                raise bad(f"overlap_s must be between 0 and {OVERLAP_S_MAX:.0f}, 30 days, got {request.overlap_s:.0f}")
            shown = await self._keys.rotate(request.key_id, request.overlap_s, caller.key_id, time.time())
            log.info("API key rotated", key=request.key_id, by=caller.key_id)
            return pb.KeySecret(key_id=request.key_id, key=shown)

        return await self._answered(context, answer)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:  # noqa: N802
        """End a key."""

        async def answer(caller: Key) -> pb.RevokeKeyResponse:
            began_s = time.monotonic()
            told, not_reached = await self._keys.revoke(request.key_id, caller.key_id, time.time())
            waited_s = time.monotonic() - began_s
            log.info("API key revoked", key=request.key_id, by=caller.key_id, not_reached=list(not_reached))
            return pb.RevokeKeyResponse(told=told, not_reached=not_reached, waited_s=waited_s)

        return await self._answered(context, answer)

    async def ExportAudit(  # noqa: N802 - gRPC's name
        self, _request: pb.ExportAuditRequest, context: Context
    ) -> AsyncIterator[pb.AuditRows]:
        """Every audited change."""
        last = 0

        async def page(_caller: Key) -> list[AuditRow]:
            return await self._accounting.books.call(lambda ledger: ledger.audit_rows(last, ROWS_MAX))

        while rows := await self._answered(context, page):
            last = rows[-1].seq
            yield pb.AuditRows(rows=[msgspec.msgpack.encode(row) for row in rows])

    async def ReportUsage(  # noqa: N802 - gRPC's name
        self, request: pb.ReportUsageRequest, context: Context
    ) -> pb.ReportUsageResponse:
        """Sums of usage; with a key that is no administrator's, of that key alone."""

        async def answer(caller: Key) -> pb.ReportUsageResponse:
            by = list(request.by)
            if unknown := [each for each in by if each not in GROUPS]:
                raise bad(f"by must be of {', '.join(GROUPS)}, got {unknown[0][:_TEXT_CHARACTERS_MAX]}")
            own = "" if "admin" in caller.scopes else caller.key_id
            await self._written()
            rows = await self._accounting.books.call(lambda ledger: ledger.sums(by, request.since_s, own))
            currency = self._usage.treasury.rules.currency
            return pb.ReportUsageResponse(by=by, sums=[_sum(len(by), row) for row in rows], currency=currency)

        return await self._answered(context, answer, "usage:own")

    async def ExportUsage(  # noqa: N802 - gRPC's name
        self, request: pb.ExportUsageRequest, context: Context
    ) -> AsyncIterator[pb.UsageRecords]:
        """Every record of a time."""
        after: tuple[float, bytes] | None = None

        async def page(_caller: Key) -> list[UsageRecord]:
            if after is None:
                await self._written()
            return await self._accounting.books.call(lambda ledger: ledger.records(request.since_s, after, ROWS_MAX))

        while records := await self._answered(context, page):
            after = records[-1].window_s, records[-1].uid
            yield pb.UsageRecords(records=[msgspec.msgpack.encode(record) for record in records])

    async def Verify(self, _request: pb.VerifyRequest, context: Context) -> pb.VerifyResponse:  # noqa: N802
        """Compare totals with records, and follow the audit chain."""

        async def answer(_caller: Key) -> pb.VerifyResponse:
            await self._written()
            records, rows, head, problems = await self._accounting.books.call(lambda ledger: ledger.verify())
            return pb.VerifyResponse(records=records, audit_rows=rows, audit_head=head, problems=problems)

        return await self._answered(context, answer)

    async def ShowPrices(self, _request: pb.ShowPricesRequest, context: Context) -> pb.ShowPricesResponse:  # noqa: N802
        """The prices in force."""

        async def answer(_caller: Key) -> pb.ShowPricesResponse:
            held = self._usage.treasury.rules
            prices = [
                pb.ModelPrice(
                    model=model,
                    prompt_nano=price.prompt,
                    cached_nano=price.cached,
                    output_nano=price.output,
                    batch_permille=price.batch_permille,
                )
                for model, price in held.prices.items()
            ]
            return pb.ShowPricesResponse(prices=prices, currency=held.currency, version=held.version)

        return await self._answered(context, answer)

    async def ShowLimits(self, request: pb.ShowLimitsRequest, context: Context) -> pb.ShowLimitsResponse:  # noqa: N802
        """What bounds a key."""

        async def answer(_caller: Key) -> pb.ShowLimitsResponse:
            scopes = ["cluster"]
            if request.key_id:
                key = self._keys.table.keys.get(request.key_id)
                if key is None:
                    message = f"There is no key {request.key_id[:_TEXT_CHARACTERS_MAX]}."
                    raise FailureError(Failure(kind=FailureKind.NOT_FOUND, message=message))
                scopes += [f"team:{key.team}", f"key:{key.key_id}"]
            levels = [level for scope in scopes for level in self._usage.levels(scope)]
            return pb.ShowLimitsResponse(levels=levels, currency=self._usage.treasury.rules.currency)

        return await self._answered(context, answer)

    async def Reload(self, _request: pb.ReloadRequest, context: Context) -> pb.ReloadResponse:  # noqa: N802
        """Read the rules again."""

        async def answer(caller: Key) -> pb.ReloadResponse:
            try:
                version, warnings = await self._accounting.reload(caller.key_id)
            except BadConfiguration as error:
                raise bad(str(error)) from None
            log.info("rules reloaded", version=version, by=caller.key_id, warnings=list(warnings))
            return pb.ReloadResponse(version=version, warnings=warnings)

        return await self._answered(context, answer)

    async def _written(self) -> None:
        """Have what was told in the ledger."""
        if self._accounting.usage is not None:
            await self._accounting.usage.write()

    @property
    def _usage(self) -> UsageDesk:
        if self._accounting.usage is None:
            raise bad("accounts.mode is off: nothing is counted")
        return self._accounting.usage

    @property
    def _keys(self) -> KeysDesk:
        if self._accounting.keys is None:
            raise bad("auth.mode is off: there are no keys")
        return self._accounting.keys

    async def _answered(self, context: Context, answer: Callable[[Key], Awaitable[T]], *scopes: KeyScope) -> T:
        """What ``answer`` gives, which is told the caller's key. Ends the call where it fails.

        ``scopes``: that are enough beside admin.
        """
        try:
            return await answer(self._caller(context, "admin", *scopes))
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
        for field, known in (("scopes", get_args(KeyScope)), ("classes", tuple(PriorityClass))):
            for each in getattr(request, field):
                if each not in known:
                    raise bad(f"{field} must be of {', '.join(known)}, got {each[:_TEXT_CHARACTERS_MAX]}")
        if "" in request.models:
            raise bad("models must be patterns of names, got an empty one, which no model has")
        scopes = tuple(request.scopes) or DEFAULT_SCOPES
        if not request.team and scopes != ("admin",):
            raise bad("team must be set: a key acts for a team")
        if request.team and not rules.TEAM_NAME.fullmatch(request.team):
            raise bad(rules.TEAM_NAME_RULE)
        if not 0 <= request.expires_in_s <= EXPIRES_IN_S_MAX:
            raise bad(
                f"expires_in_s must be between 0, never, and {EXPIRES_IN_S_MAX:.0f}, got {request.expires_in_s:.0f}"
            )
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


def _sum(groups: int, row: tuple[Any, ...]) -> pb.UsageSum:
    summed = dict(zip(SUMMED, row[groups + 1 :], strict=True))
    numbers = {_SUM_FIELDS.get(name, name): value or 0 for name, value in summed.items()}
    return pb.UsageSum(group=[str(each) for each in row[:groups]], requests=row[groups], **numbers)


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
