"""What a sequence adds to its text, step by step: vLLM's detokeniser without the output objects around it."""

from __future__ import annotations

import msgspec
from vllm.outputs import RequestOutput
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from front_proxy.request.generation import GenerationDelta


class PromptFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer's usage says of its prompt."""

    token_ids: list[int]
    cached_tokens: int | None
    created_cache_tokens: int | None


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice of the answer grew by. The choice's last one has ``finish_reason``."""

    index: int = 0
    text: str
    tokens: int
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
            tokens=self.tokens + more.tokens,
            finish_reason=more.finish_reason,
            stop_reason=more.stop_reason,
        )


class Detokeniser:
    """Text of one sequence, stop strings applied, as vLLM's OutputProcessor makes it for streamed outputs."""

    __slots__ = ("_detokeniser",)

    def __init__(self, tokenizer: TokenizerLike | None, request: EngineCoreRequest) -> None:
        used = tokenizer if request.sampling_params.detokenize else None
        self._detokeniser = IncrementalDetokenizer.from_new_request(used, request)

    def add(self, delta: GenerationDelta) -> TextDelta:
        """The text that became certain."""
        detokeniser, finish = self._detokeniser, delta.finish
        before = detokeniser.num_output_tokens()
        reason, stop = (None, None) if finish is None else (finish.reason, finish.stop_token_id)
        matched = detokeniser.update(delta.token_ids, reason == "stop")
        if matched is not None:
            reason, stop = "stop", matched
        return TextDelta(
            text=detokeniser.get_next_output_text(reason is not None, True),
            # Fewer than came, where a stop string ended the text before the last of them.
            tokens=detokeniser.num_output_tokens() - before,
            finish_reason=reason,
            stop_reason=stop,
        )


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
            tokens=len(choice.token_ids),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt=facts,
        )
        for choice in output.outputs
    ]
