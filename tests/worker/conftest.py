"""Workers in this process, for every test here."""

from __future__ import annotations

from tests.support.in_process_worker import start_worker

__all__ = ["start_worker"]
