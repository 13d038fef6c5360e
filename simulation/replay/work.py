"""What a simulated worker is given, and where it tells what becomes of it. Holds values only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from simulation.replay.engine import Engine


class Work:
    """One request at one worker. ``tokens`` must have their KV before it decodes; ``left`` are to be given here."""

    __slots__ = (
        "cached_tokens",
        "computed",
        "ends_at",
        "given",
        "joined_at",
        "keyed",
        "keys",
        "last_s",
        "left",
        "lends",
        "request_id",
        "source",
        "tokens",
    )

    def __init__(self, request_id: int, keys: tuple[int, ...], tokens: int, left: int, *, lends: bool = False) -> None:
        self.request_id = request_id
        self.keys = keys
        self.tokens = tokens
        self.left = left
        # Its blocks stay after its first token until ``Engine.let_go``.
        self.lends = lends
        # Which engine lends its KV, for which work, to be pulled; None: it is computed here.
        self.source: tuple[Engine, Work] | None = None
        # When its client got its last token, here or elsewhere; 0: none yet.
        self.last_s = 0.0
        # Tokens given here.
        self.given = 0
        # Of ``tokens``, those whose KV is here; of ``keys``, how many leading ones it shares.
        self.computed = self.keyed = self.cached_tokens = 0
        # Numbers of the worker's decode steps.
        self.joined_at = self.ends_at = 0


class Listener(Protocol):
    """Is told what engines give, at the present time of the world."""

    def gave_first(self, engine: Engine, work: Work) -> None:
        """A request's first token here."""

    def gave_last(self, engine: Engine, work: Work) -> None:
        """A request's last token here."""

    def pull(self, engine: Engine, work: Work, tokens: int) -> None:
        """KV of ``tokens`` tokens must be moved here; calls ``Engine.pulled`` when it is."""

    def changed(self, engine: Engine) -> None:
        """There is something to report."""

    def gap(self, gap_s: float, tokens: int) -> None:
        """So many tokens came so long after the ones before them."""
