"""`baton keys` and `baton audit`: keys, and what was changed by them."""

from __future__ import annotations

import asyncio
import json as json_format
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter, validators

from cli.settings import NO_SOURCES, Sources, StateDir, load, state_folder
from runtime.process import command_line

T = TypeVar("T")

keys = command_line.new_app("keys", "API keys of teams: make, show, rotate and revoke them.")
audit = command_line.new_app("audit", "What was changed, by whose key: rows that are chained by their hashes.")

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_Json = Annotated[bool, Parameter(help="print JSON")]
_Many = Annotated[Sequence[str], Parameter(negative=())]


def ask(sources: Sources, state_dir: StateDir, call: Callable[[Any, Any], Awaitable[T]]) -> T:
    """What the scheduler answers to ``call``, which gets its stub and the metadata of the administrator's key."""
    from launcher.hosted import operator_commands
    from launcher.hosted.process_plan import secrets_dir
    from scheduler.accounting.secrets_folder import ADMIN_KEY

    config = load(sources, state_dir).value
    folder = state_folder(config)
    path = secrets_dir(config, folder) / ADMIN_KEY
    key = path.read_text().strip() if path.exists() else ""
    return asyncio.run(operator_commands.accounts(folder, key, call))


def seconds(text: str) -> float:
    """What ``90d``, ``12h`` or a number of seconds says. Raises ValueError."""
    unit = _UNITS_S.get(text[-1:], 0.0)
    try:
        said = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        said = math.nan
    if not 0 <= said < math.inf:
        raise ValueError(f"a time is a number with s, m, h or d behind it, such as 90d, got {text!r}")
    return said


def _duration(_: Any, tokens: Sequence[Any]) -> float:
    return seconds(tokens[0].value)


Duration = Annotated[float, Parameter(converter=_duration, n_tokens=1, metavar="90d")]


def _key_id(_: Any, tokens: Sequence[Any]) -> str:
    """Refuses a whole key: an error or an audit row would repeat its secret."""
    from accounts.keys import named_id

    text = str(tokens[0].value)
    if (key_id := named_id(text)) is not None:
        raise ValueError(f"this is a whole key, which is secret; its id is {key_id}")
    return text


KeyId = Annotated[str, Parameter(converter=_key_id, n_tokens=1)]


@keys.command
def create(
    *,
    team: Annotated[str, Parameter(help="team that it acts for")] = "",
    name: Annotated[str, Parameter(help="for people")] = "",
    scopes: Annotated[_Many, Parameter(help="inference, usage:own, admin (default: the first two)")] = (),
    models: Annotated[_Many, Parameter(help="patterns of models that it may use (default: all)")] = (),
    classes: Annotated[_Many, Parameter(help="priority classes that it may ask for (default: all)")] = (),
    budget: Annotated[_Many, Parameter(help="such as 50/month: day, week, month or total")] = (),
    limit: Annotated[_Many, Parameter(help="such as requests_per_minute=60")] = (),
    expires: Annotated[
        float | None,
        Parameter(
            converter=_duration,
            n_tokens=1,
            metavar="90d",
            help="time until it ends (default: it does not)",
            validator=validators.Number(gt=0),
        ),
    ] = None,
    state_dir: StateDir = None,
    json: _Json = False,
    sources: Sources = NO_SOURCES,
) -> None:
    """Make a key, and print it: it is shown once."""
    from protos.accounts.v1 import accounts_pb2 as pb

    request = pb.CreateKeyRequest(
        team=team,
        name=name,
        scopes=scopes,
        models=models,
        classes=classes,
        budgets=budget,
        limits=limit,
        expires_in_s=expires or 0.0,
    )
    _show_secret(ask(sources, state_dir, lambda stub, key: stub.CreateKey(request, metadata=key)), json=json)


@keys.command(name="list")
def list_(*, state_dir: StateDir = None, json: _Json = False, sources: Sources = NO_SOURCES) -> None:
    """Show every key, revoked ones too; no secret."""
    found = _keys(sources, state_dir)
    if json:
        print(json_format.dumps([_as_json(key) for key in found]))
        return
    rows = [("KEY", "TEAM", "NAME", "SCOPES", "STATE")]
    rows += [(key.key_id, key.team or "-", key.name or "-", ",".join(key.scopes), _state(key)) for key in found]
    print(table(rows))


@keys.command
def show(key_id: KeyId, /, *, state_dir: StateDir = None, json: _Json = False, sources: Sources = NO_SOURCES) -> None:
    """Show one key; no secret."""
    from launcher.hosted.operator_commands import CommandError

    found = [key for key in _keys(sources, state_dir) if key.key_id == key_id]
    if not found:
        raise CommandError(f"there is no key {key_id}")
    told = _as_json(found[0])
    print(json_format.dumps(told) if json else table([(name, str(value)) for name, value in told.items()]))


@keys.command
def rotate(
    key_id: KeyId,
    /,
    *,
    overlap: Annotated[Duration, Parameter(help="time for which the former secret is still good")] = 86_400.0,
    state_dir: StateDir = None,
    json: _Json = False,
    sources: Sources = NO_SOURCES,
) -> None:
    """Give a key another secret, under the same id, and print it: it is shown once."""
    from protos.accounts.v1 import accounts_pb2 as pb

    request = pb.RotateKeyRequest(key_id=key_id, overlap_s=overlap)
    _show_secret(ask(sources, state_dir, lambda stub, key: stub.RotateKey(request, metadata=key)), json=json)


@keys.command
def revoke(key_id: KeyId, /, *, state_dir: StateDir = None, sources: Sources = NO_SOURCES) -> None:
    """End a key. Returns when no front proxy accepts it any more; requests that run go on."""
    from protos.accounts.v1 import accounts_pb2 as pb

    request = pb.RevokeKeyRequest(key_id=key_id)
    done = ask(sources, state_dir, lambda stub, key: stub.RevokeKey(request, metadata=key))
    print(f"{key_id} is revoked: {len(done.told)} front proxies know, after {done.waited_s:.3f} s")
    if done.not_reached:
        print(f"not reached, and too old by now to accept it: {', '.join(done.not_reached)}")


@audit.command
def export(*, state_dir: StateDir = None, sources: Sources = NO_SOURCES) -> None:
    """Print every row as a line of JSON, the oldest first."""
    for row in _audit_rows(sources, state_dir):
        told = {
            "seq": row.seq,
            "at_s": row.at_s,
            "actor": row.actor,
            "action": row.action,
            "subject": row.subject,
            "detail": row.detail,
            "previous": row.previous.hex(),
            "hash": row.hash.hex(),
        }
        print(json_format.dumps(told))


@audit.command
def verify(*, state_dir: StateDir = None, sources: Sources = NO_SOURCES) -> int:
    """Follow the chain of hashes, and print the last one: an end that was cut off shows by it."""
    from accounts.audit import FIRST, broken_at

    rows = _audit_rows(sources, state_dir)
    broken = broken_at(rows)
    if broken is not None:
        print(f"row {broken} is not what was written there")
        return 1
    print(f"{len(rows)} rows; the last hash is {(rows[-1].hash if rows else FIRST).hex()}")
    return 0


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _keys(sources: Sources, state_dir: StateDir) -> Sequence[Any]:
    from protos.accounts.v1 import accounts_pb2 as pb

    answer = ask(sources, state_dir, lambda stub, key: stub.ListKeys(pb.ListKeysRequest(), metadata=key))
    return list(answer.keys)


def _audit_rows(sources: Sources, state_dir: StateDir) -> list[Any]:
    import msgspec

    from accounts.audit import AuditRow
    from protos.accounts.v1 import accounts_pb2 as pb

    async def collect(stub: Any, key: Any) -> list[Any]:
        stream = stub.ExportAudit(pb.ExportAuditRequest(), metadata=key)
        return [msgspec.msgpack.decode(row, type=AuditRow) async for page in stream for row in page.rows]

    return ask(sources, state_dir, collect)


def _show_secret(made: Any, *, json: bool) -> None:
    print(json_format.dumps({"key_id": made.key_id, "key": made.key}) if json else made.key)


def _state(key: Any) -> str:
    import time

    if key.revoked:
        return "revoked"
    return "expired" if 0 < key.expires_at_s <= time.time() else "active"


def _as_json(key: Any) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "team": key.team,
        "name": key.name,
        "state": _state(key),
        "scopes": list(key.scopes),
        "models": list(key.models),
        "classes": list(key.classes),
        "budgets": list(key.budgets),
        "limits": list(key.limits),
        "expires_at_s": key.expires_at_s,
        "created_by": key.created_by,
        "created_at_s": key.created_at_s,
        "old_until_s": key.old_until_s,
    }
