"""Workers in this process, for every test here."""

from __future__ import annotations

from tests.support.in_process_worker import (
    EOF,
    WAIT_S,
    Client,
    InProcessWorker,
    StartWorker,
    sampling,
    start_worker,
    submit,
)

__all__ = ["EOF", "WAIT_S", "Client", "InProcessWorker", "StartWorker", "sampling", "start_worker", "submit"]
