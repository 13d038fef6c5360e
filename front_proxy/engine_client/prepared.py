"""What vLLM made of a request, for others that differ from it in their prompt alone. Checks nothing."""

from __future__ import annotations

import time
from copy import copy

import msgspec
from vllm.v1.engine import EngineCoreRequest

from front_proxy.engine_client.sampling import Encodings, encode
from runtime.unique import new_id


class Prepared(msgspec.Struct, frozen=True):
    """``request`` passed vLLM's validation. It has no prompt, and its parameters do not change any more."""

    request: EngineCoreRequest
    encodings: Encodings | None
    """None: they have a seed that was drawn for one request."""

    @classmethod
    def of(cls, request: EngineCoreRequest) -> Prepared:
        """For all that differ from this one in their prompt and id alone."""
        like = copy(request)
        like.prompt_token_ids, like.cache_salt, like.trace_headers = [], None, None
        encodings = encode(request.sampling_params)
        return cls(like, None if encodings.continuation is None else encodings)

    def again(
        self, token_ids: list[int], request_id: str, max_tokens: int
    ) -> tuple[EngineCoreRequest, Encodings | None]:
        """A request with this prompt, and its encodings where they are known."""
        request = copy(self.request)
        request.prompt_token_ids = token_ids
        request.external_req_id = request_id
        request.request_id = f"{request_id}-{new_id():.8}"
        request.arrival_time = time.time()
        if request.sampling_params.max_tokens == max_tokens:
            return request, self.encodings
        request.sampling_params = copy(request.sampling_params)
        request.sampling_params.max_tokens = max_tokens
        return request, None
