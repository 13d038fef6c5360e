"""Bounds of a GenerateMany stream for tests."""

from __future__ import annotations

from typing import Any

from front_proxy.config import FrontProxyLimits

MESSAGE_BYTES_MAX = 1 << 20
REQUESTS_MAX = 4


def limits(**changed: Any) -> FrontProxyLimits:
    """The usual ones but for what is ``changed``."""
    usual = {"output_deltas_max": 16, "output_bytes_max": MESSAGE_BYTES_MAX, "message_bytes_max": MESSAGE_BYTES_MAX}
    return FrontProxyLimits(**{**usual, **changed})
