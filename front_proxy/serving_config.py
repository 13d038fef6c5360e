"""Options of the OpenAI-compatible serving layer, as typed settings. Holds values only."""

from __future__ import annotations

import msgspec


class ServingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What vLLM's serving layer is told."""
