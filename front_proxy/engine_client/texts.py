"""What a sequence adds to its text, step by step: vLLM's detokeniser without the output objects around it."""

from __future__ import annotations

import msgspec
from transformers import TokenizersBackend
from vllm.outputs import RequestOutput
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer

from engine.protocol import Finish
from front_proxy.request.generation import GenerationDelta

PROMPT_TAIL_TOKENS = 32
"""Of the prompt, that a detokeniser gets, if they end with a whole character. It decodes them once, to see how the
output goes on behind them. With all of a prompt, that would take 0.2 us a token."""


class PromptFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer's usage says of its prompt."""

    token_ids: list[int]
    cached_tokens: int | None
    created_cache_tokens: int | None


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice of the answer grew by. The choice's last one has ``finish_reason``."""

    index: int = 0
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt: PromptFacts | None = None
    """With the first delta of an answer."""

    def then(self, more: TextDelta | None) -> TextDelta:
        """This and the next one of the same choice as one."""
        if more is None:
            return self
        return msgspec.structs.replace(
            self,
            text=self.text + more.text,
            token_ids=self.token_ids + more.token_ids,
            finish_reason=more.finish_reason,
            stop_reason=more.stop_reason,
        )


class Detokeniser:
    """Text of one sequence, stop strings applied, as vLLM's OutputProcessor makes it for streamed outputs."""

    __slots__ = ("_ahead", "_decode_next", "_detokeniser")

    def __init__(self, tokenizer: TokenizerLike | None, request: EngineCoreRequest) -> None:
        used = tokenizer if request.sampling_params.detokenize else None
        tail = request.prompt_token_ids[-PROMPT_TAIL_TOKENS:]
        if isinstance(used, TokenizersBackend) and not used.backend_tokenizer.decode(tail).endswith("\ufffd"):
            request = msgspec.structs.replace(request, prompt_token_ids=tail)
        self._detokeniser = IncrementalDetokenizer.from_new_request(used, request)
        # Without stop strings, all text of a token is certain, and vLLM need not keep it.
        simple = isinstance(self._detokeniser, BaseIncrementalDetokenizer) and not self._detokeniser.stop
        self._decode_next = self._detokeniser.decode_next if simple else None if used else _no_text
        self._ahead: tuple[list[int], TextDelta] | None = None

    @property
    def silent(self) -> bool:
        """Whether no token has a text."""
        return self._decode_next is _no_text

    def middle(self, token_ids: list[int]) -> str | None:
        """The text that tokens before the last make certain. None: a stop string ends it, and ``add`` says how."""
        if self._decode_next is not None:
            if len(token_ids) == 1:
                return self._decode_next(token_ids[0])
            return "".join(map(self._decode_next, token_ids))
        piece = self._step(token_ids, None)
        if piece.finish_reason is None:
            return piece.text
        self._ahead = token_ids, piece
        return None

    def add(self, delta: GenerationDelta) -> TextDelta:
        """What the delta adds, the end included."""
        if self._ahead is not None and self._ahead[0] is delta.token_ids:
            return self._ahead[1]
        return self._step(delta.token_ids, delta.finish)

    def _step(self, token_ids: list[int], finish: Finish | None) -> TextDelta:
        detokeniser = self._detokeniser
        reason, stop = (None, None) if finish is None else (finish.reason, finish.stop_token_id)
        before = detokeniser.num_output_tokens()
        matched = detokeniser.update(token_ids, reason == "stop")
        if matched is not None:
            reason, stop = "stop", matched
            # Fewer than came, where the stop string ended before the last of them.
            token_ids = token_ids[: detokeniser.num_output_tokens() - before]
        text = detokeniser.get_next_output_text(reason is not None, True)
        return TextDelta(text=text, token_ids=token_ids, finish_reason=reason, stop_reason=stop)


def _no_text(_token_id: int) -> str:
    return ""


def of_output(output: RequestOutput) -> list[TextDelta]:
    """The same of what vLLM's OutputProcessor made."""
    facts = PromptFacts(
        token_ids=output.prompt_token_ids or [],
        cached_tokens=output.num_cached_tokens,
        created_cache_tokens=output.num_cache_creation_tokens,
    )
    return [
        TextDelta(
            index=choice.index,
            text=choice.text,
            token_ids=list(choice.token_ids),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt=facts,
        )
        for choice in output.outputs
    ]
