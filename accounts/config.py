"""Settings of keys and of accounts, and their constants. Holds values only."""

from __future__ import annotations

from typing import Literal

import msgspec

from runtime.bounds import Positive, PositiveCount


class AuthConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may ask (docs/accounts.md)."""

    mode: Literal["off", "required"] = "off"
    """required: every HTTP and gRPC API asks for a key, but for /health and /ping. Watch
    baton_front_proxy_refusals_total{reason="key"}."""
    secrets_dir: str = ""
    """Folder of `pepper`, which the digests of keys depend on, and of `admin.key`. Both are made where they
    are missing, readable by their owner alone. Front proxies and schedulers need the same. Empty: the state folder."""
    keys_max_age_s: Positive = 60.0
    """Time a front proxy goes on with its table of keys when it does not hear the scheduler. Then it answers 503. It is
    also the longest that `baton keys revoke` waits for it."""


class AccountsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What use costs, and what bounds it (docs/accounts.md)."""

    mode: Literal["off", "count", "enforce"] = "off"
    """count: every request is recorded, and none is refused. enforce: budgets and limits hold; it needs keys. Watch
    baton_scheduler_refusals_total, reasons account_*."""
    rules_file: str = ""
    """TOML file of prices, teams and limits; `baton reload` reads it again. Empty: there are none."""
    ledger_file: str = ""
    """SQLite file of keys, usage and audit. Schedulers on several machines need one file system that honours locks.
    Empty: in the state folder."""
    slice_tokens: PositiveCount = 512
    """Output tokens that a request holds money for at a time. Smaller: less is held for nothing, more is asked.
    `baton limits` shows what is held."""
    when_away: Literal["serve", "refuse"] = "serve"
    """What front proxies do with new requests while no scheduler answers. serve: book them afterwards, beyond a budget
    if need be."""

    def check(self, auth: AuthConfig) -> None:
        """Raise ValueError where the two do not go together."""
        if self.mode == "enforce" and auth.mode == "off":
            raise ValueError("accounts.mode enforce needs auth.mode required: without keys any client may be any team")


class AccountsLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Constants that no operator needs to choose. Tests and the simulation hand in others."""

    unknown_after_s: float = 30.0
    """Time after which the holds of a front proxy that went away are settled as they are, as an estimate."""
    rebuild_grace_s: float = 5.0
    """Time that a new leader waits for front proxies which were there before, until it grants holds on limited keys."""
    waiting_max: int = 4096
    """Requests that may wait for a rate limit to have room for them."""
    wait_max_s: float = 120.0
    """Longest such wait."""
    tell_within_s: float = 0.02
    """Time that a front proxy lets a record wait for others and for a question to travel with: a write over gRPC costs
    more than all else that is done with a record."""
    commit_interval_s: float = 5.0
    """Records that come within so long are written together, unless one asks for what was used: a commit costs as much
    as a hundred of them."""
    commit_records_max: int = 4096
    """Records of one commit; SQLite takes 32,766 values in one statement at least."""
    records_max: int = 65536
    """Records that may wait: in a front proxy for the scheduler, in the scheduler for its disk."""
    cost_wait_s: float = 2.0
    """Time a front proxy waits, once a request is over, for its workers to tell what it cost."""
    keys_max: int = 100_000


LIMITS = AccountsLimits()
