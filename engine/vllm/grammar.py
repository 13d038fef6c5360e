"""Finds out why the engine core could not compile a grammar. Compiles only grammars that failed there.

The engine core finishes such a request as an error and writes the reason only to its log. To compile each grammar here
before the engine does would cost as much as the engine's own work; to compile those that failed costs good requests
nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_types import StructuredOutputBackend
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
from vllm.v1.structured_output.request import get_structured_output_key

from engine.vllm import private

CHECK_TIMEOUT_S = 20.0
"""Longest wait for the reason. Without one the failure counts as the engine's, not as the grammar's."""
_WORDS_CHARACTERS_MAX = 2000


class GrammarCheck:
    """Asks the backend that the engine used, in this process. One grammar at a time."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._vllm_config = vllm_config
        self._backends: dict[str, StructuredOutputBackend] = {}
        # One thread: a check that outlives its timeout keeps it, and the next check waits for that one.
        self._thread = ThreadPoolExecutor(1, "grammar check")
        # The engine core has logged its warning, and in this process it would be logged a second time.
        logging.getLogger(GuidanceBackend.__module__).setLevel(logging.ERROR)

    async def fault(self, params: SamplingParams, token_ids: Sequence[int]) -> str | None:
        """What is wrong with the grammar of ``params``, under which the engine made these tokens.

        None: no fault was found.
        """
        if params.structured_outputs is None or params.structured_outputs.all_constraints_none():
            return None
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._fault, params, token_ids)
        except TimeoutError:
            return None

    def _fault(self, params: SamplingParams, token_ids: Sequence[int]) -> str | None:
        wanted = params.structured_outputs
        assert wanted is not None
        backend = self._backend_of(private.grammar_backend(wanted))
        if backend is None:
            return None
        try:
            key = get_structured_output_key(wanted)
            grammar = backend.compile_grammar(*key, stop_token_ids=params.all_stop_token_ids)
        except Exception as error:  # noqa: BLE001 - each backend has errors of its own
            return f"The grammar does not compile: {error}".strip()[:_WORDS_CHARACTERS_MAX]
        if words := private.grammar_error(grammar):
            return f"The grammar does not compile: {words}".strip()[:_WORDS_CHARACTERS_MAX]
        allowed = backend.allocate_token_bitmask(1)
        for count, token_id in enumerate(token_ids):
            grammar.fill_bitmask(allowed, 0)
            if not allowed.any():
                return f"The grammar leads nowhere: it allows no token behind its first {count}."
            if not grammar.accept_tokens("", [token_id]):
                return None
        return None

    def _backend_of(self, name: str) -> StructuredOutputBackend | None:
        """Made when it is first asked for: it reads the whole vocabulary."""
        if name not in self._backends and (made := _backend_class(name)) is not None:
            model = self._vllm_config.model_config
            tokenizer = cached_tokenizer_from_config(model)
            self._backends[name] = made(self._vllm_config, tokenizer=tokenizer, vocab_size=model.get_vocab_size())
        return self._backends.get(name)


def _backend_class(name: str) -> type[StructuredOutputBackend] | None:
    """Those that vLLM's StructuredOutputManager chooses from."""
    if name == "outlines":
        from vllm.v1.structured_output.backend_outlines import OutlinesBackend

        return OutlinesBackend
    if name == "lm-format-enforcer":
        from vllm.v1.structured_output.backend_lm_format_enforcer import LMFormatEnforcerBackend

        return LMFormatEnforcerBackend
    return {"xgrammar": XgrammarBackend, "guidance": GuidanceBackend}.get(name)
