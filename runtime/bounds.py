"""Number types for settings: what is out of range is an error when the configuration is loaded, not in the night."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1)]
# Beyond thirty years in seconds, and short of infinity: JSON, which children get their settings in, has no word for it.
_LARGEST = 1e9
NonNegative = Annotated[float, msgspec.Meta(ge=0.0, le=_LARGEST)]
Fraction = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0, le=_LARGEST)]
LogLevel = Literal["critical", "error", "warning", "info", "debug"]
