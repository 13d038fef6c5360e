"""Bounds of a GenerateMany stream for tests."""

from __future__ import annotations

from typing import Any

from front_proxy.grpc_api.service import StreamBounds

MESSAGE_BYTES_MAX = 1 << 20


def bounds(**changed: Any) -> StreamBounds:
    """The usual ones but for what is ``changed``."""
    usual = {"requests_max": 4, "outputs_max": 16, "output_bytes_max": MESSAGE_BYTES_MAX, "retry_after_s": 1.0}
    more = {"message_bytes_max": MESSAGE_BYTES_MAX, "name_characters_max": 1024}
    return StreamBounds(**{**usual, **more, **changed})
