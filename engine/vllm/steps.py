"""Delivers an engine step's outputs in one loop, in the turn of the event loop in which the step arrives.

Takes the place of vLLM's OutputProcessor in AsyncLLM. vLLM's own detokenises, builds a RequestOutput and wakes one task
for every token. Here token ids go straight to the request's listener, so a step costs what its tokens cost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessorOutput

from engine.protocol import EngineOutput, EngineRequest, Finish, Hold, OnOutput
from engine.vllm import values
from kv_transfer.handoff.handoff import KvHandoff

MakeHandoff = Callable[[EngineRequest, dict[str, Any]], KvHandoff | None]

_NOTHING_TO_RETURN = OutputProcessorOutput(request_outputs=[], reqs_to_abort=[])


class LiveSequence:
    """One request, from before vLLM is given it until its end."""

    def __init__(self, request: EngineRequest, on_output: OnOutput) -> None:
        self.request = request
        self.on_output = on_output
        self.first = True
        # Whether the engine has finished it. ``ended`` cannot tell: when a waiter is cancelled, so is the future.
        self.over = False
        # Its last output where the request itself may be at fault. Not delivered.
        self.doubtful: EngineOutput | None = None
        # All its tokens if it has a grammar: from them GrammarCheck finds out what is wrong with the grammar.
        self.token_ids: list[int] | None = None
        # Whether the listener has the hand-off, and with it the duty to release it.
        self.handed_over = False
        # vLLM's own name for it, once it has one.
        self.engine_request_id: str | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: BaseException) -> None:
        """End it with an error. The first end counts."""
        self.over = True
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()  # the waiter may have left: mark the error as retrieved


class StepOutputs:
    """The methods of OutputProcessor that AsyncLLM calls, for requests announced with ``expect``."""

    def __init__(self, make_handoff: MakeHandoff) -> None:
        self._make_handoff = make_handoff
        # Whether the engine leaves out the last tokens of a prompt whose KV it holds. The token that it samples then
        # does not follow the whole prompt, so it is not shown.
        self.hides_prefill_tokens = False
        self._expected: dict[str, LiveSequence] = {}
        self._live: dict[str, LiveSequence] = {}

    def expect(self, request: EngineRequest, on_output: OnOutput) -> LiveSequence:
        """Announce a request before AsyncLLM is given it."""
        live = LiveSequence(request, on_output)
        self._expected[request.request_id] = live
        return live

    def forget(self, live: LiveSequence) -> None:
        """Nothing listens any more. Idempotent."""
        self._expected.pop(live.request.request_id, None)
        if live.engine_request_id is not None:
            self._live.pop(live.engine_request_id, None)

    # What AsyncLLM calls

    def add_request(self, request: EngineCoreRequest, *_: object) -> None:
        """Register a request that vLLM has named and is about to send to the engine."""
        live = self._expected.pop(request.external_req_id or request.request_id)
        live.engine_request_id = request.request_id
        self._live[request.request_id] = live

    def process_outputs(
        self,
        outputs: Sequence[EngineCoreOutput],
        timestamp_s: float | None = None,
        iteration_stats: Any = None,
        **_: object,
    ) -> OutputProcessorOutput:
        """Deliver what one step made. ``timestamp_s`` is the engine's clock at the step's end."""
        tokens = 0
        broken: list[str] = []
        for output in outputs:
            live = self._live.get(output.request_id)
            if live is None:
                continue  # it was aborted, and this was on its way
            tokens += len(output.new_token_ids)
            try:
                self._deliver(live, output, timestamp_s or 0.0)
            except Exception as error:  # noqa: BLE001 - a defect here costs this request, not the others of the step
                self.forget(live)
                live.fail(error)
                broken.append(output.request_id)
        if iteration_stats is not None:
            iteration_stats.num_generation_tokens += tokens
        return OutputProcessorOutput(request_outputs=[], reqs_to_abort=broken) if broken else _NOTHING_TO_RETURN

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        """Which of these the engine must abort: all of them. Only Baton aborts, and only requests that run."""
        assert internal, "requests have only their internal names here"
        return list(request_ids)

    def propagate_error(self, error: Exception) -> None:
        """The engine is lost: every request ends with ``error``."""
        lost = [*self._expected.values(), *self._live.values()]
        self._expected.clear()
        self._live.clear()
        for live in lost:
            live.fail(error)

    def update_scheduler_stats(self, _: object) -> None:
        """LoRA statistics, of which there are none."""

    def has_request(self, request_id: str) -> bool:
        """Whether the request runs."""
        return request_id in self._live

    def get_num_unfinished_requests(self) -> int:
        """How many run."""
        return len(self._live)

    def get_num_queued_tokens(self) -> int:
        """Prompt tokens of the requests that have no output yet, for ``max_num_queued_tokens``."""
        return sum(len(live.request.token_ids) for live in self._live.values() if live.first)

    def _deliver(self, live: LiveSequence, output: EngineCoreOutput, timestamp_s: float) -> None:
        request = live.request
        finish = None
        handoff = None
        hidden = self.hides_prefill_tokens and isinstance(request.transfer, Hold)
        if output.finish_reason is not None:
            finish = values.finish(output.finish_reason, output.stop_reason)
            if hidden and finish.reason == "stop":
                # By a token that is not shown: the output has not even begun.
                finish = Finish("length")
            self.forget(live)
            # Only a request that ended by its length is followed by a decode; nothing pulls the KV of others.
            if output.kv_transfer_params and finish.reason == "length":
                handoff = self._make_handoff(request, output.kv_transfer_params)
        first = None
        if live.first:
            live.first = False
            first = values.first_output(output.prefill_stats, _times(output), timestamp_s)
        logprobs, scored = output.new_logprobs, output.new_prompt_logprobs_tensors
        made = EngineOutput(
            token_ids=[] if hidden else output.new_token_ids,
            finish=finish,
            first=first,
            logprobs=None if logprobs is None or hidden else values.logprob_columns(*logprobs[:3]),
            prompt_logprobs=None if scored is None else values.logprob_columns(*scored[:3]),
            handoff=handoff,
        )
        if live.token_ids is not None:
            live.token_ids += output.new_token_ids
        if finish is not None and _is_doubtful(finish, live.token_ids):
            live.doubtful = made
        else:
            live.on_output(made)
        live.handed_over = handoff is not None
        if finish is not None:
            live.over = True
            if not live.ended.done():
                live.ended.set_result(None)


def _is_doubtful(finish: Finish, token_ids: list[int] | None) -> bool:
    """An error; or a grammar that ended at once, as happens if its backend could not read it."""
    return finish.reason == "error" or (finish.reason == "stop" and token_ids is not None and len(token_ids) == 1)


def _times(output: EngineCoreOutput) -> tuple[float, float]:
    """When the request was queued and first scheduled, on the engine's clock; 0 where the engine did not say."""
    queued_s = scheduled_s = 0.0
    for event in output.events or ():
        if event.type == EngineCoreEventType.QUEUED:
            queued_s = event.timestamp
        elif event.type == EngineCoreEventType.SCHEDULED and not scheduled_s:
            scheduled_s = event.timestamp
    return queued_s, scheduled_s
