"""The headers that say how far rates are used, with the names that each API's clients read."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from accounts.account import Level, Standing

Headers = list[tuple[bytes, bytes]]
_REQUESTS, _TOKENS = (
    tuple(f"x-ratelimit-{what}-{name}".encode() for what in ("limit", "remaining", "reset"))
    for name in ("requests", "tokens")
)


def rate_headers(standing: Standing | None, path: str) -> Headers:
    """Those of an answer. Tokens are those of prompts or of output, whichever has less left."""
    if standing is None:
        return []
    requests, prompt, output = standing.requests, standing.prompt, standing.output
    tokens = prompt or output
    if prompt is not None and output is not None and output.remaining * prompt.limit < prompt.remaining * output.limit:
        tokens = output
    if "/v1/messages" in path:
        named = {"requests": requests, "tokens": tokens, "input-tokens": prompt, "output-tokens": output}
        return [each for name, level in named.items() if level is not None for each in _anthropic(name, level)]
    headers = [] if requests is None else _openai(_REQUESTS, requests)
    return headers if tokens is None else headers + _openai(_TOKENS, tokens)


def _openai(names: Sequence[bytes], level: Level) -> Headers:
    limit, remaining, reset = names
    return [(limit, b"%d" % level.limit), (remaining, b"%d" % level.remaining), (reset, b"%.3fs" % level.reset_s)]


def _anthropic(name: str, level: Level) -> Headers:
    reset = datetime.now(UTC) + timedelta(seconds=level.reset_s)
    values = {"limit": level.limit, "remaining": level.remaining, "reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ")}
    return [(f"anthropic-ratelimit-{name}-{what}".encode(), str(value).encode()) for what, value in values.items()]
