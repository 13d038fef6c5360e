"""The Engine protocol over vLLM's AsyncLLM in this process. Converts values at the seam and decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import structlog
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.version import __version__ as vllm_version

from engine.config import LIMITS, EngineConfig
from engine.epoch import next_epoch
from engine.preflight import RDMA_DEVICES, rdma_devices
from engine.protocol import (
    BlockListener,
    EngineDead,
    EngineError,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Hold,
    InvalidRequest,
    MeasuredStep,
    OnOutput,
    TakeOver,
)
from engine.ranks import Ranks
from engine.vllm import args, private, values
from engine.vllm.block_event_stream import BlockEventStream
from engine.vllm.experts import arguments as experts
from engine.vllm.grammar import GrammarCheck
from engine.vllm.load import LoadRecorder
from engine.vllm.parsed_args import output_settings
from engine.vllm.release_batcher import ReleaseBatcher
from engine.vllm.steps import LiveSequence, StepOutputs
from engine.work_meter import WorkMeter
from kv_transfer.handoff.handoff import KvHandoff
from kv_transfer.handoff.keys import FACTS, RELEASE, RENEW
from kv_transfer.tiers.config import Tier

log = structlog.get_logger(__name__)

_sampling_decoder = msgspec.msgpack.Decoder(SamplingParams)
_map_decoder = msgspec.msgpack.Decoder(dict[str, Any])


class _Objection:
    """A file in which the engine's processes may say what is wrong with a setting. Of them vLLM says that one died."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="baton-engine-")
        self.path = f"{self._folder.name}/objection"
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        with self._folder:
            told = Path(self.path)
            if isinstance(error, EngineDead) and told.exists():
                raise ValueError(told.read_text()) from error


class _StatLogger(LoadRecorder, StatLoggerBase):
    """The recorder as vLLM wants to see it."""


class VllmEngine:
    """One AsyncLLM, its identity and its latest load."""

    # Known when it has served its first token.
    _info: EngineInfo

    def __init__(
        self, llm: AsyncLLM, load: LoadRecorder, worker_id: str, events: args.EventAddresses | None = None
    ) -> None:
        self._llm = llm
        self._events = events
        self._block_events: dict[int, BlockEventStream] = {}
        self._load = load
        self._worker_id = worker_id
        self._message_ids = itertools.count()
        self._release_batcher = ReleaseBatcher(self._release, LIMITS.pulled_release_delay_s)
        self._closed = False
        ranks, cache = llm.vllm_config.parallel_config.data_parallel_size, llm.vllm_config.cache_config
        self._ranks = Ranks(
            ranks, block_size_tokens=cache.block_size, blocks_max=(cache.num_gpu_blocks or 0) // ranks
        ) if ranks > 1 else None  # fmt: skip
        self._holders: dict[str, int] = {}
        """The data-parallel rank that holds the KV of each lease, until it is released."""
        self._placement_off: str | None = None
        """Why experts are not placed; None: they do not run in parallel."""
        self._facts: dict[str, Any] = {}
        self._steps = StepOutputs(self._handoff)
        self._grammar_check = GrammarCheck(llm.vllm_config)
        private.replace_output_processor(llm, self._steps)
        private.receive_fast(llm)
        private.hear_steps_first(llm, load.heard)
        private.take_grammars_as_decided(llm)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        worker_id: str,
        role: str,
        host: str,
        advertise_host: str,
        tiers: Sequence[Tier] = (),
    ) -> VllmEngine:
        """Start the engine's processes and serve one token, so that the first client does not pay for that."""
        if not config.model:
            raise ValueError("engine.model: no model is set")
        if config.transport_required and not rdma_devices():
            raise ValueError(f"engine.transport_required: this machine has no RDMA device in {RDMA_DEVICES}")
        args.prepare_environment(config)
        with contextlib.ExitStack() as stack:
            try:
                address, port = stack.enter_context(args.held_ports(host, config.data_parallel_size))
            except OSError as error:
                raise ValueError(f"worker.host: NIXL cannot listen at {host}: {error.strerror}") from error
            side_channel = args.SideChannelAddress(advertise_host or host, address, port)
            objection = stack.enter_context(_Objection())
            return await cls._start_at(
                config,
                worker_id=worker_id,
                role=role,
                side_channel=side_channel,
                tiers=tiers,
                objection=objection.path,
            )

    @classmethod
    async def _start_at(
        cls,
        config: EngineConfig,
        *,
        worker_id: str,
        role: str,
        side_channel: args.SideChannelAddress,
        tiers: Sequence[Tier],
        objection: str,
    ) -> VllmEngine:
        epoch = next_epoch()
        engine_id = f"{worker_id}-{epoch}"
        events = args.event_addresses(config)
        arguments = args.engine_args(
            config, engine_id=engine_id, side_channel=side_channel, events=events, tiers=tiers, objection=objection
        )
        load = _StatLogger()
        how = "eager" if arguments.enforce_eager else "compiled"
        chosen_by = "the device" if config.enforce_eager is None else "engine.enforce_eager"
        log.info("starting vLLM", worker=worker_id, role=role, engine=engine_id, how=how, chosen_by=chosen_by)
        try:
            async with asyncio.timeout(LIMITS.start_timeout_s):
                # In threads: they take many seconds, and signals and health checks must go on.
                await asyncio.to_thread(args.load_model_class, config.model)
                placement_off = await asyncio.to_thread(experts.prepare, arguments, config)
                llm = await asyncio.to_thread(
                    AsyncLLM.from_engine_args,
                    arguments,
                    usage_context=UsageContext.ENGINE_CONTEXT,
                    stat_loggers=[load.logger_factory],
                )
                settings = output_settings(
                    config,
                    tokenizer=values.tokenizer_identity(llm.vllm_config.model_config),
                    second_runner=llm.vllm_config.use_v2_model_runner,
                )
                if arguments.disable_log_stats:
                    private.remove_prometheus(llm)
                engine = cls(llm, load, worker_id, events)
                engine._placement_off = placement_off
                warm_s = await engine._serve_one_token()
                engine._info = info = values.engine_info(
                    llm.vllm_config,
                    config,
                    version=vllm_version,
                    epoch=epoch,
                    engine_id=engine_id,
                    output_settings=settings,
                    facts=engine._facts,
                    tiers=tiers,
                    warm_s=warm_s,
                )
                load.set_capacity(blocks=info.kv_blocks_total, block_bytes=info.block_bytes)
                engine._steps.hides_prefill_tokens = info.prefill_backoff_tokens > 0
        except TimeoutError as error:
            raise EngineDead(f"vLLM did not start within {LIMITS.start_timeout_s:.0f} s") from error
        except (RuntimeError, EngineDeadError) as error:
            raise EngineDead(f"vLLM did not start: {error}") from error
        return engine

    @property
    def info(self) -> EngineInfo:
        """Fixed for the life of this object."""
        return self._info

    @property
    def meter(self) -> WorkMeter:
        """Whose work its steps were."""
        return self._load.meter

    async def generate(self, request: EngineRequest, on_output: OnOutput) -> None:
        """Run one sequence to its end; see ``Engine``. Raises EngineError."""
        await self._run(request, self._sampling(request), on_output)

    async def _run(self, request: EngineRequest, params: SamplingParams, on_output: OnOutput) -> None:
        heard = on_output if self._ranks is None else self._ranks.hearing(request.request_id, on_output)
        live = self._steps.expect(request, heard)
        if params.structured_outputs is not None:
            live.token_ids = []
        try:
            await self._submit(request, params)
            await live.ended
            if live.doubtful is not None:
                if fault := await self._grammar_check.fault(params, live.token_ids or ()):
                    raise InvalidRequest(fault)
                on_output(live.doubtful)
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine process is gone") from error
        except (VLLMClientError, ValueError, TypeError) as error:
            raise InvalidRequest(str(error)) from error
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM failed this request: {error.__cause__ or error}") from error
        finally:
            await self._leave(live)

    async def release(self, handoff_lease_id: str) -> None:
        """Free the KV a ``Hold`` kept. Idempotent; safe while or after it is pulled."""
        await self._release([handoff_lease_id])

    async def renew(self, handoff_lease_id: str, lease_s: float) -> None:
        """Keep the KV of a ``Hold`` for ``lease_s`` from now, if it is still held; never shorter than before."""
        await self._tell_connector({RENEW: {handoff_lease_id: lease_s}}, self._holders.get(handoff_lease_id))

    def pulled(self, handoff_lease_id: str) -> None:
        """Release it a moment later. NIXL's notification has freed the blocks already, unless the pull had failed."""
        self._release_batcher.add(handoff_lease_id)

    def load(self) -> EngineLoad:
        """The latest known load, without waiting."""
        load = self._load.load()
        if self._ranks is None:
            return load
        return msgspec.structs.replace(load, ranks=self._ranks.loads(*self._load.of_ranks(len(self._ranks))))

    def take_steps(self) -> list[MeasuredStep]:
        """The last steps since this was called, oldest first; without waiting."""
        return self._load.take_steps()

    def report_blocks(self, listener: BlockListener, rank: int = 0) -> bool:
        """Tell it of all KV blocks of a rank since the engine began. False: it publishes no events; see ``args``."""
        assert rank not in self._block_events, "one listener"
        if self._events is not None:
            self._block_events[rank] = BlockEventStream(self._events.of_rank(rank), listener)
            self._load.report_store_blocks(listener.told, rank)
        return self._events is not None

    async def join_experts(self, role: str, scheduler_address: str) -> None:
        """Let the scheduler place the experts, if they run in parallel: each rank then speaks to it itself."""
        if self._placement_off is None:
            return
        if self._placement_off:
            log.warning("experts stay where they are", why=self._placement_off)
        known = {
            "model": self._info.model,
            "role": role,
            "worker_id": self._worker_id,
            "epoch": self._info.epoch,
            "placement_off": self._placement_off,
        }
        # Every rank does it, and the first one's answer is all that comes back.
        await self._llm.collective_rpc(experts.JOIN, args=(known, scheduler_address))

    async def check_health(self) -> None:
        """Raise EngineDead when the engine can do no more work."""
        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine process is gone") from error

    async def ping(self) -> None:
        """Return when the engine core's loop has answered, which it does between two steps. Raises EngineDead."""
        try:
            await self._llm.is_sleeping()
        except EngineDeadError as error:
            raise EngineDead("the vLLM engine process is gone") from error

    async def close(self) -> None:
        """Stop the engine and free what it holds, within the configured bound."""
        if self._closed:
            return
        self._closed = True
        self._release_batcher.close()
        for stream in self._block_events.values():
            stream.close()
        timeout_s = LIMITS.close_timeout_s
        private.stop_output_loop(self._llm)
        try:
            async with asyncio.timeout(timeout_s + LIMITS.close_grace_s):
                await asyncio.to_thread(self._llm.shutdown, timeout_s)
        except TimeoutError:
            log.error("vLLM did not stop in time", waited_s=timeout_s + LIMITS.close_grace_s)

    async def _release(self, lease_ids: list[str]) -> None:
        """Each to the rank that holds it: vLLM would send the message to the least busy one."""
        of_rank: dict[int | None, list[str]] = {}
        for lease_id in lease_ids:
            of_rank.setdefault(self._holders.pop(lease_id, None), []).append(lease_id)
        for rank, leases in of_rank.items():
            await self._tell_connector({RELEASE: leases}, rank)

    async def _tell_connector(self, params: dict[str, Any], rank: int | None) -> None:
        if self._closed or self._llm.errored:
            return
        with contextlib.suppress(EngineDeadError):
            await private.tell_connector(self._llm, f"baton-message-{next(self._message_ids)}", params, rank)

    def _rank_for(self, request: EngineRequest) -> int | None:
        """The data-parallel rank that computes a request, and holds its KV; None: there is one."""
        if self._ranks is None:
            return None
        rank = self._ranks.choose(
            request.request_id,
            request.token_ids,
            salt=request.cache_salt or "",
            comes_with_kv=isinstance(request.transfer, TakeOver),
            named=request.rank,
        )
        if isinstance(request.transfer, Hold):
            self._holders[request.request_id] = rank
        return rank

    def _sampling(self, request: EngineRequest) -> SamplingParams:
        """The request's sampling for vLLM, with the transfer it asks for. Transfer params of a client are dropped."""
        try:
            params = _sampling_decoder.decode(request.sampling)
        except VLLMClientError as error:
            raise InvalidRequest(str(error)) from error
        except (msgspec.DecodeError, ValueError, TypeError) as error:
            raise InvalidRequest(f"sampling parameters cannot be read: {error}") from error
        if params.n != 1 or params.stop:
            raise InvalidRequest("an engine takes one sequence a request and no stop strings")
        params.output_kind = RequestOutputKind.DELTA
        params.detokenize = False
        extra = {k: v for k, v in (params.extra_args or {}).items() if not k.endswith("_transfer_params")}
        match request.transfer:
            case Hold(lease_s=lease_s):
                extra["kv_transfer_params"] = values.hold_params(request.request_id, lease_s)
            case TakeOver(handoff=handoff):
                # The prefill engine scored the prompt; asking again would make this one compute it.
                params.prompt_logprobs = None
                extra["kv_transfer_params"] = values.take_over_params(handoff)
            case None:
                pass
        params.extra_args = extra or None
        return params

    async def _submit(self, request: EngineRequest, params: SamplingParams) -> None:
        kwargs = request.reasoning_parser_kwargs
        await self._llm.add_request(
            request.request_id,
            tokens_input(request.token_ids, cache_salt=request.cache_salt),
            params,
            trace_headers=request.trace_headers,
            priority=request.priority,
            session_id=request.session_id,
            data_parallel_rank=self._rank_for(request),
            reasoning_ended=request.reasoning_ended,
            reasoning_parser_kwargs=_map_decoder.decode(kwargs) if kwargs else None,
        )

    async def _leave(self, live: LiveSequence) -> None:
        """However a request ended: stop it in the engine, and free KV that nothing will pull."""
        running = not live.over
        self._steps.forget(live)
        if self._ranks is not None:
            self._ranks.ended(live.request.request_id)
        if self._llm.errored:
            return  # nothing is held by a dead engine
        with contextlib.suppress(EngineDeadError):
            if running and live.engine_request_id is not None:
                await self._llm.abort(live.engine_request_id, internal=True)
            if isinstance(live.request.transfer, Hold) and not live.handed_over:
                # It may have finished in the engine while we left, or ended with its first token. Nothing pulls its KV.
                await self.release(live.request.request_id)

    def _handoff(self, request: EngineRequest, params: dict[str, Any]) -> KvHandoff | None:
        if FACTS in params:
            self._facts = params[FACTS]
            return None
        assert isinstance(request.transfer, Hold)
        return values.handoff(
            params,
            self._info,
            worker_id=self._worker_id,
            lease_id=request.request_id,
            lease_s=request.transfer.lease_s,
        )

    async def _serve_one_token(self) -> float:
        """The time that it took. Its answer also brings what only the engine's process knows, where that is Baton's."""
        began_s = time.monotonic()
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        sampling.output_kind = RequestOutputKind.DELTA
        sampling.extra_args = {"kv_transfer_params": {FACTS: True}}
        request = EngineRequest(request_id="warm-up", token_ids=[0], sampling=b"")
        await self._run(request, sampling, lambda _: None)
        return time.monotonic() - began_s
