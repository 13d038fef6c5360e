"""Baton's connector, spoiling held KV of requests whose id asks for it. For tests of what happens then.

In a request id, ``flip`` changes one bit of the KV once it is held, ``negate`` makes all of it other KV, and
``reuse`` makes it other KV once it is released, as a next request would. ``unchecked`` leaves out the checksums.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from kv_transfer.nixl import connector as shipped
from kv_transfer.nixl.scheduler import BatonNixlScheduler
from kv_transfer.nixl.worker import BatonNixlWorker


class Scheduler(BatonNixlScheduler):
    """Remembers which blocks are held, for the worker half in the same process."""

    blocks: ClassVar[dict[str, list[int]]] = {}

    def request_finished(self, request: Any, block_ids: Any) -> Any:
        held, answer = super().request_finished(request, block_ids)
        if held and answer is not None:
            self.blocks[request.request_id] = list(answer["remote_block_ids"][0])
        return held, answer

    def _is_checked(self, lease: str) -> bool:
        return "unchecked" not in lease and super()._is_checked(lease)


class Worker(BatonNixlWorker):
    """Spoils."""

    def start_load_kv(self, metadata: Any) -> None:
        super().start_load_kv(metadata)
        for request_id in metadata.baton_held:
            if "flip" in request_id:
                self._regions[0][Scheduler.blocks[request_id][0], 0] ^= 1
            if "negate" in request_id:
                self._negate(request_id)
        for request_id in metadata.baton_release:
            if "reuse" in request_id:
                self._negate(request_id)

    def _negate(self, request_id: str) -> None:
        for region in self._regions:
            for block in Scheduler.blocks[request_id]:
                region[block].view(torch.float32).neg_()


class NixlConnector(shipped.NixlConnector):
    """Named as vLLM wants it."""

    scheduler_half = Scheduler
    worker_half = Worker
