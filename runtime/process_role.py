"""The kinds of process that a cluster has."""

from __future__ import annotations

from typing import Literal

Role = Literal["scheduler", "prefill", "decode", "front_proxy"]
"""What a process does in the cluster. `baton status` shows these words."""
