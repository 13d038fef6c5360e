"""`baton usage`, `prices`, `limits` and `reload`: what was used, what it is billed and what it cost."""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any

from cyclopts import Parameter, validators

from cli.accounts import Duration, KeyId, ask, table
from cli.settings import NO_SOURCES, Sources, StateDir
from runtime.process import command_line

usage = command_line.new_app("usage", "What was used and what it cost.")
prices = command_line.new_app("prices", "What models cost.")

_Json = Annotated[bool, Parameter(help="print JSON")]
_Since = Annotated[Duration, Parameter(help="only what began within so long (default: everything)", name="--last")]
_NANO = 10**9
_US_AN_HOUR = 3_600 * 10**6


@usage.default
def report(
    *,
    by: Annotated[
        Sequence[str],
        command_line.one_or_more_of(("team", "model", "key", "day"), "what to sum by; days are of UTC", "GROUPS"),
    ] = ("team",),
    cost: Annotated[bool, Parameter(help="show what it took of the engines")] = False,
    last: _Since = 0.0,
    state_dir: StateDir = None,
    json: _Json = False,
    sources: Sources = NO_SOURCES,
) -> None:
    """Show what was used, by team unless something else is asked for."""
    answer = _sums(sources, state_dir, by, last)
    if json:
        print(json_format.dumps([_as_json(answer, each) for each in answer.sums]))
        return
    head = [*(each.upper() for each in answer.by), "REQUESTS", "PROMPT", "CACHED", "OUTPUT", "BILLED", "ESTIMATED"]
    rows = [head + (["ENGINE_S", "DISCARDED"] if cost else [])]
    for each in answer.sums:
        billed = f"{_shown(each.amount_nano)} {answer.currency}"
        tokens = (each.requests, each.prompt_tokens, each.cached_tokens, each.output_tokens)
        row = [*each.group, *map(str, tokens), billed, str(each.estimated)]
        rows.append(row + ([f"{each.engine_us / 1e6:.3f}", str(each.discarded_tokens)] if cost else []))
    print(table(rows))


@usage.command
def export(*, last: _Since = 0.0, state_dir: StateDir = None, sources: Sources = NO_SOURCES) -> None:
    """Print every record as a line of JSON, the oldest first."""
    import msgspec

    from accounts.usage import UsageRecord
    from protos.accounts.v1 import accounts_pb2 as pb

    async def collect(stub: Any, key: Any) -> None:
        stream = stub.ExportUsage(pb.ExportUsageRequest(since_s=_since_s(last)), metadata=key)
        async for page in stream:
            for packed in page.records:
                record = msgspec.structs.asdict(msgspec.msgpack.decode(packed, type=UsageRecord))
                attempts = [msgspec.structs.asdict(each) for each in record["attempts"]]
                print(json_format.dumps({**record, "uid": record["uid"].hex(), "attempts": attempts}))

    ask(sources, state_dir, collect)


@usage.command
def verify(*, state_dir: StateDir = None, sources: Sources = NO_SOURCES) -> int:
    """Compare the totals with the records, and follow the audit chain."""
    from protos.accounts.v1 import accounts_pb2 as pb

    found = ask(sources, state_dir, lambda stub, key: stub.Verify(pb.VerifyRequest(), metadata=key))
    for problem in found.problems:
        print(problem)
    print(f"{found.records} records, {found.audit_rows} audit rows, {len(found.problems)} problems")
    return 1 if found.problems else 0


@prices.command
def show(*, state_dir: StateDir = None, json: _Json = False, sources: Sources = NO_SOURCES) -> None:
    """Show the prices in force, for a million tokens."""
    from protos.accounts.v1 import accounts_pb2 as pb

    held = ask(sources, state_dir, lambda stub, key: stub.ShowPrices(pb.ShowPricesRequest(), metadata=key))
    rows = [("MODEL", "PROMPT", "CACHED", "OUTPUT", "BATCH")]
    for each in held.prices:
        numbers = (each.prompt_nano, each.cached_nano, each.output_nano)
        a_million = [_shown(number * 10**6) for number in numbers]
        rows.append((each.model, *a_million, f"{each.batch_permille / 1000:g}"))
    if json:
        print(json_format.dumps([dict(zip(map(str.lower, rows[0]), row, strict=True)) for row in rows[1:]]))
        return
    print(f"in {held.currency}, of rules {held.version or '-'}")
    print(table(rows))


@prices.command
def suggest(
    *,
    gpu_hour: Annotated[
        float, Parameter(help="what an hour of one worker costs", validator=validators.Number(gt=0, lt=float("inf")))
    ],
    last: _Since = 0.0,
    state_dir: StateDir = None,
    sources: Sources = NO_SOURCES,
) -> None:
    """Print prices at which what was used would have paid for the engines' time.

    Engine time alone: a worker that idles costs as much. What a cached token costs is not measured: a tenth of a
    computed one is suggested.
    """
    answer = _sums(sources, state_dir, ("model",), last)
    for each in answer.sums:
        computed, output = each.computed_tokens, each.output_tokens
        if not computed or not output:
            print(f"# {each.group[0]}: too little was used to tell")
            continue
        a_us = gpu_hour / _US_AN_HOUR
        prompt = max(round(each.prefill_us * a_us / computed * 1e6, 3), 0.001)
        print(f'[prices."{each.group[0]}"]')
        print(f"prompt_per_million = {prompt:.3f}")
        print(f"cached_per_million = {prompt / 10:.3f}")
        print(f"output_per_million = {max((each.engine_us - each.prefill_us) * a_us / output * 1e6, 0.001):.3f}")


def limits(
    key_id: KeyId = "", /, *, state_dir: StateDir = None, json: _Json = False, sources: Sources = NO_SOURCES
) -> None:
    """Show what bounds a key, its team and the cluster, and how far it is used.

    Parameters
    ----------
    key_id
        id of the key; without it the cluster alone is shown
    """
    from protos.accounts.v1 import accounts_pb2 as pb

    request = pb.ShowLimitsRequest(key_id=key_id)
    held = ask(sources, state_dir, lambda stub, key: stub.ShowLimits(request, metadata=key))
    rows = [("SCOPE", "LIMIT", "OF", "USED", "HELD")]
    for each in held.levels:
        money = each.name.startswith("budget")
        numbers = [_shown(number) if money else str(number) for number in (each.limit, each.used, each.held)]
        rows.append((each.scope, each.name, *numbers))
    if json:
        print(json_format.dumps([dict(zip(map(str.lower, rows[0]), row, strict=True)) for row in rows[1:]]))
        return
    print(table(rows) if held.levels else "nothing bounds it")


def reload(*, state_dir: StateDir = None, sources: Sources = NO_SOURCES) -> None:
    """Read prices, teams and limits again. If they are wrong, the former ones stay."""
    from protos.accounts.v1 import accounts_pb2 as pb

    done = ask(sources, state_dir, lambda stub, key: stub.Reload(pb.ReloadRequest(), metadata=key))
    for warning in done.warnings:
        print(f"warning: {warning}")
    print(f"rules {done.version} hold")


def _sums(sources: Sources, state_dir: StateDir, by: Sequence[str], last: float) -> Any:
    from protos.accounts.v1 import accounts_pb2 as pb

    request = pb.ReportUsageRequest(by=by, since_s=_since_s(last))
    return ask(sources, state_dir, lambda stub, key: stub.ReportUsage(request, metadata=key))


def _since_s(last: float) -> float:
    return time.time() - last if last else 0.0


def _shown(nano: int) -> str:
    return f"{Decimal(nano) / _NANO:.6f}".rstrip("0").rstrip(".")


def _as_json(answer: Any, each: Any) -> dict[str, Any]:
    told = {field.name: value for field, value in each.ListFields() if field.name != "group"}
    return {**dict(zip(answer.by, each.group, strict=True)), **told, "currency": answer.currency}
