"""A front proxy's settings and constants from one list of names."""

from __future__ import annotations

from typing import Any

from front_proxy.config import FrontProxyConfig, FrontProxyLimits


def configured(**values: Any) -> tuple[FrontProxyConfig, FrontProxyLimits]:
    """Both, each with the values that are its own."""
    limits = {name: values.pop(name) for name in FrontProxyLimits.__struct_fields__ if name in values}
    return FrontProxyConfig(**values), FrontProxyLimits(**limits)
