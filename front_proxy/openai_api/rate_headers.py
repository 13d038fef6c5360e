"""The headers that say how far rates are used, with the names that each API's clients read."""

from __future__ import annotations

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
    both = [level for level in (standing.prompt, standing.output) if level is not None]
    tokens = min(both, key=lambda level: level.remaining / level.limit, default=None)
    if "/v1/messages" in path:
        named = {"requests": standing.requests, "tokens": tokens}
        named |= {"input-tokens": standing.prompt, "output-tokens": standing.output}
        return [each for name, level in named.items() if level is not None for each in _anthropic(name, level)]
    return [
        header
        for names, level in ((_REQUESTS, standing.requests), (_TOKENS, tokens))
        if level is not None
        for header in zip(names, _values(level), strict=True)
    ]


def _values(level: Level) -> tuple[bytes, bytes, bytes]:
    return b"%d" % level.limit, b"%d" % level.remaining, b"%.3fs" % level.reset_s


def _anthropic(name: str, level: Level) -> Headers:
    reset = datetime.now(UTC) + timedelta(seconds=level.reset_s)
    values = {"limit": level.limit, "remaining": level.remaining, "reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ")}
    return [(f"anthropic-ratelimit-{name}-{what}".encode(), str(value).encode()) for what, value in values.items()]
