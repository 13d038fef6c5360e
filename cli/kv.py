"""`baton kv`: looks at what KV tiers hold, checks it, removes what is of no use, and fills them."""

from __future__ import annotations

import asyncio
import functools
import json as json_module
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.settings import NO_SOURCES, KvTiers, Sources, StateDir, kv_tiers, load, state_folder
from runtime.columns import aligned
from runtime.process import command_line
from runtime.user_error import UserError

if TYPE_CHECKING:
    from kv_transfer.stores.places import Place

app = command_line.new_app("kv", "Look at KV tiers, and care for what they hold.")

# Each prompt twice: a block is stored when a second request has it.
_WARM_TURNS = 2
_WARM_AT_ONCE = 4
_ANSWER_TIMEOUT_S = 600.0


class KvError(UserError):
    """Something that cannot be done with the tiers as they are."""


@app.command
def ls(*, kv_tier: KvTiers = (), json: bool = False, sources: Sources = NO_SOURCES) -> None:
    """List what lies in the folders and buckets of the tiers, by model.

    Parameters
    ----------
    json
        print JSON
    """
    found = []
    with _answering():
        for place in _places(kv_tier, sources):
            found += [_described(place, fingerprint) for fingerprint in place.fingerprints()]
    if json:
        print(json_module.dumps({"found": found}, indent=2))
        return
    titles = ("tier", "place", "fingerprint", "model", "vllm", "segments", "blocks", "bytes", "scopes")
    rows = [[str(each[title]) or "-" for title in titles] for each in found]
    print("\n".join(aligned([[title.upper() for title in titles], *rows])))


@app.command
def stat(*, json: bool = False, state_dir: StateDir = None, sources: Sources = NO_SOURCES) -> None:
    """Show the tiers of every worker of a running cluster: what they hold, and what was loaded and stored.

    Parameters
    ----------
    json
        print JSON
    """
    from launcher.hosted import state_file
    from launcher.hosted.status import collect
    from launcher.hosted.timing import Timing

    record = state_file.read(state_folder(load(sources, state_dir).value))
    lines = asyncio.run(collect(record, timeout_s=Timing().status_timeout_s))
    tiers = [
        {"name": f"{line.id}/{tier.name}", "kind": tier.name, "on": not tier.why_off}
        | {name: getattr(tier, name) for name in _STAT_FIELDS}
        for line in lines
        for tier in line.kv_tiers
    ]
    if json:
        print(json_module.dumps({"tiers": tiers}, indent=2))
        return
    titles = ("name", *_STAT_FIELDS)
    rows = [[str(tier[title] if tier[title] != "" else "-") for title in titles] for tier in tiers]
    print("\n".join(aligned([[title.replace("_", " ").upper() for title in titles], *rows])))


_STAT_FIELDS = (
    "blocks", "bytes", "capacity_bytes", "hits", "misses", "corrupt", "stored", "evicted", "declined",
    "read_bytes_per_s", "why_off",
)  # fmt: skip


@app.command
def verify(*, kv_tier: KvTiers = (), remove: bool = False, sources: Sources = NO_SOURCES) -> int:
    """Read everything in the folders and buckets of the tiers, and list what is not what was stored.

    Exits with 1 if anything is corrupt, or is encrypted with another key than its tier's key_file names, so that
    it could not be checked. Engines may use the tiers meanwhile.

    Parameters
    ----------
    remove
        remove segments with corrupt blocks
    """
    from kv_transfer.stores.places import SEALED, verified

    corrupt = total = unchecked = 0
    with _answering():
        for place in _places(kv_tier, sources):
            parts = [part for fingerprint in place.fingerprints() for part in place.parts(fingerprint)]
            with _progress(f"{place.tier.kind} {place.tier.place}", len(parts)) as step:
                for part, why in verified(place, parts):
                    total += 1
                    step(1)
                    unchecked += why == SEALED
                    if why and why != SEALED:
                        corrupt += 1
                        print(f"{place.tier.place}/{part.fingerprint}/{part.rank}/{part.name}: {why}", flush=True)
                        place.remove([part] if remove else [])
    removed = ", removed" if remove and corrupt else ""
    closed = f", {unchecked} of which only names and sizes were checked: {SEALED}" if unchecked else ""
    print(f"{total} segments, {corrupt} corrupt{removed}{closed}")
    return 1 if corrupt or unchecked else 0


@app.command
def gc(*, kv_tier: KvTiers = (), sources: Sources = NO_SOURCES) -> None:
    """Remove what no engine can use: drafts of dead writers, parts of segments, models in folders that no engine uses.

    Engines do this too when they start or need room; a tier stays within its capacity without it.
    """
    with _answering():
        for place in _places(kv_tier, sources):
            print(f"{place.tier.kind} {place.tier.place}: {place.collect()} bytes removed")


@app.command
def warm(
    file: Path,
    /,
    *,
    url: str | None = None,
    state_dir: StateDir = None,
    sources: Sources = NO_SOURCES,
) -> None:
    """Compute the prompts of a file on a running cluster, so that its tiers have them.

    Parameters
    ----------
    file
        one prompt a line: text, or an object with the fields of a completion or a chat completion
    url
        front proxy, as in http://127.0.0.1:8000 (default: the first one of the cluster on this machine)
    """
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise KvError(f"{file} cannot be read: {error}") from error
    if not lines:
        raise KvError(f"{file} has no prompt")
    asyncio.run(_warm([_request(line) for line in lines], url or _front_proxy(state_dir, sources)))


def _request(line: str) -> dict[str, Any]:
    if line.lstrip().startswith("{"):
        try:
            given = json_module.loads(line)
        except json_module.JSONDecodeError as error:
            raise KvError(f"{line[:60]!r} is no JSON: {error}") from error
        if "prompt" not in given and "messages" not in given:
            raise KvError(f"{line[:60]!r} has neither prompt nor messages")
        return dict(given)
    return {"prompt": line}


async def _warm(requests: Sequence[dict[str, Any]], url: str) -> None:
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=_ANSWER_TIMEOUT_S) as client:
        try:
            model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        except httpx.HTTPError as error:
            raise KvError(f"{url} does not answer: {error}") from error
        slots, tokens = asyncio.Semaphore(_WARM_AT_ONCE), 0

        async def ask(request: dict[str, Any]) -> None:
            nonlocal tokens
            path = "/v1/chat/completions" if "messages" in request else "/v1/completions"
            body = {"model": model, **request, "max_tokens": 1, "stream": False}
            async with slots:
                for _ in range(_WARM_TURNS):
                    answer = await client.post(path, json=body)
                    if answer.is_error:
                        raise KvError(f"{url} refused a prompt: {answer.text[:200]}")
                    tokens += answer.json()["usage"]["prompt_tokens"]
            step(1)

        with _progress("prompts", len(requests)) as step:
            await asyncio.gather(*(ask(request) for request in requests))
        print(f"{len(requests)} prompts, {tokens // _WARM_TURNS} tokens")


def _front_proxy(state_dir: Any, sources: Sources) -> str:
    from launcher.hosted import state_file

    record = state_file.read(state_folder(load(sources, state_dir).value))
    for process in record.processes:
        if process.role == "front_proxy" and process.address:
            return f"http://{process.address}"
    raise KvError("no front proxy runs; `baton status` says more, and --url names one elsewhere")


def _places(kv_tier: Sequence[str], sources: Sources) -> Iterator[Place]:
    from kv_transfer.stores.places import place_of
    from kv_transfer.tiers.config import parse

    tiers = parse(load(sources, kv_tiers(kv_tier)).value.kv.tiers)
    found = [place for tier in tiers if (place := place_of(tier))]
    if not found:
        raise KvError("kv.tiers names no file or s3 tier; give it with --kv-tier, as for `baton up`")
    yield from found


def _described(place: Place, fingerprint: str) -> dict[str, Any]:
    parts, about = place.parts(fingerprint), place.about(fingerprint)
    size = sum(part.size_bytes for part in parts)
    return {
        "tier": place.tier.kind,
        "place": place.tier.place,
        "fingerprint": fingerprint,
        "model": about.model if about is not None else "",
        "vllm": about.vllm if about is not None else "",
        "segments": len({part.name for part in parts}),
        "blocks": size // about.block_bytes if about is not None else 0,
        "bytes": size,
        "scopes": len({part.name.split("-")[2] for part in parts}),
    }


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KvError(f"a tier cannot be looked at: {error}") from error
    except ValueError as error:
        # A key file, when the first segment is to be opened.
        raise KvError(str(error)) from error


@contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield functools.partial(bar.advance, task)
