"""Who may ask: checks the keys of requests against the table that the scheduler pushes. Keeps no key."""

from __future__ import annotations

from collections.abc import Callable

from accounts.key_table import Denied, Key, KeyScope
from front_proxy.gateway.metrics import REFUSALS
from front_proxy.planning.key_watch import KeyWatch
from runtime.failures import Failure, FailureError, FailureKind


class KeyGate:
    """Of one front proxy that asks for keys."""

    def __init__(
        self,
        watch: KeyWatch,
        *,
        model: str,
        now_s: Callable[[], float],
        wall_s: Callable[[], float],
    ) -> None:
        """``model``: the one that serves, by its first name; aliases of it are the same model."""
        self.model = model
        self._watch = watch
        self._now_s = now_s
        self._wall_s = wall_s

    def admit(self, shown: bytes, scope: KeyScope | None) -> Key:
        """Whose key this is. ``scope``: what it must allow. Raises FailureError, counted as a refusal."""
        if self._now_s() >= self._watch.good_until_s:
            message = "API keys cannot be checked: the scheduler is not reachable."
            raise _refused(FailureKind.UNAVAILABLE, message)
        found = self._watch.table.find(shown, self._wall_s())
        if isinstance(found, Denied):
            raise _refused(FailureKind.UNAUTHENTICATED, found.value, "invalid_api_key")
        if scope is not None and scope not in found.scopes:
            raise _refused(FailureKind.FORBIDDEN, f"API key {found.key_id} lacks the scope {scope}.")
        if scope == "inference" and not found.allows_model(self.model):
            raise _refused(FailureKind.FORBIDDEN, f"API key {found.key_id} may not use the model {self.model}.")
        return found


def _refused(kind: FailureKind, message: str, code: str = "") -> FailureError:
    REFUSALS.labels("key").inc()
    return FailureError(Failure(kind=kind, message=message, code=code))
