"""One sequence in the fake engine: its tokens, its blocks, its end. Never decides which sequence runs next."""

from __future__ import annotations

import asyncio
import hashlib
import struct

from engine.fake.model import FakeSampling, TokenState
from engine.protocol import EngineError, EngineOutput, EngineRequest, Finish, OnOutput


class Sequence:
    """Mutable state of one request."""

    def __init__(
        self,
        request: EngineRequest,
        sampling: FakeSampling,
        state: TokenState,
        now_s: float,
        on_output: OnOutput,
    ) -> None:
        self.request = request
        self.sampling = sampling
        self.state = state
        self.tokens = list(request.token_ids)
        self.emitted = 0
        self.blocks = 0
        self.cached = 0
        self.external = 0
        # Tokens that the next step computes.
        self.computing = 1
        self.pull_done = False
        self.left = False
        self.error: EngineError | None = None
        self.arrived_s = now_s
        self.scheduled_s = now_s
        self.on_output = on_output
        # Whether the listener has the hand-off, and with it the duty to release it.
        self.handed_over = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def deliver(self, output: EngineOutput) -> None:
        """Deliver the output of a step. The output with ``finish`` is the last."""
        if self.ended.done():
            return
        try:
            self.on_output(output)
        except Exception as error:  # noqa: BLE001 - the listener's defect costs this request, not the others
            self.ended.set_exception(error)
            self.ended.exception()
            return
        self.handed_over = output.handoff is not None
        if output.finish is not None and not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error: EngineError) -> None:
        """The engine is lost."""
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()  # the waiter may have left: mark the error as retrieved

    def append(self, token: int) -> None:
        """A new token was made."""
        self.tokens.append(token)
        self.state.append(token)
        self.emitted += 1

    def finish(self, token: int, eos_token_id: int | None, context_tokens_max: int) -> Finish | None:
        """Why the sequence ends with ``token``, checked in vLLM's order."""
        if self.emitted >= self.sampling.min_tokens:
            if token == eos_token_id and not self.sampling.ignore_eos:
                return Finish("stop")
            if token in (self.sampling.stop_token_ids or ()):
                return Finish("stop", token)
        limit = self.sampling.max_tokens
        if (limit is not None and self.emitted >= limit) or len(self.tokens) >= context_tokens_max:
            return Finish("length")
        return None

    def block_keys(self, block_size: int) -> list[bytes]:
        """A chained digest for every full block of the tokens so far."""
        chain = hashlib.blake2b((self.request.cache_salt or "").encode(), digest_size=16)
        keys = []
        for start in range(0, len(self.tokens) - block_size + 1, block_size):
            chain.update(struct.pack(f"<{block_size}I", *self.tokens[start : start + block_size]))
            keys.append(chain.digest())
        return keys
