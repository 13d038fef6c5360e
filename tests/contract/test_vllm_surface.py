"""Every vLLM name that we touch, compared with what the code imports. An upgrade of vLLM fails here first."""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest

from tests.test_repository import PACKAGES, ROOT

pytestmark = pytest.mark.vllm

NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"

# module -> what we import from it; the first test compares this with the code.
NAMES = {
    "vllm": ["ModelRegistry", "envs"],
    "vllm.config": ["VllmConfig"],
    "vllm.distributed.kv_transfer.kv_connector.utils": ["BlockIds"],
    "vllm.distributed.kv_transfer.kv_connector.v1.base": [
        "KVConnectorMetadata",
        "KVConnectorRole",
        "KVConnectorTransferResults",
        "KVConnectorWorkerMetadata",
    ],
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics": ["KVConnectorStats"],
    NIXL: ["NixlPullConnector", "NixlPullConnectorScheduler", "NixlPullConnectorWorker"],
    f"{NIXL}.connector": ["NixlBaseConnector"],
    f"{NIXL}.metadata": ["GET_META_MSG", "NixlConnectorMetadata"],
    f"{NIXL}.stats": ["NixlKVConnectorStats"],
    "vllm.distributed.nixl_utils": ["NixlWrapper"],
    "vllm.engine.arg_utils": ["AsyncEngineArgs"],
    "vllm.engine.protocol": ["EngineClient"],
    "vllm.entrypoints.launchers.api_server.app_state": ["init_app_state"],
    "vllm.entrypoints.launchers.app": ["build_app"],
    "vllm.entrypoints.launchers.cli_args": ["make_arg_parser", "validate_parsed_serve_args"],
    "vllm.entrypoints.launchers.launcher": ["validate_api_server_args"],
    "vllm.exceptions": [
        "GracefulHTTPError",
        "VLLMClientError",
        "VLLMError",
        "VLLMNotFoundError",
        "VLLMValidationError",
    ],
    "vllm.inputs.engine": ["tokens_input"],
    "vllm.logprobs": ["Logprob"],
    "vllm.outputs": ["CompletionOutput", "PoolingRequestOutput", "RequestOutput"],
    "vllm.platforms": ["current_platform"],
    "vllm.reasoning": ["ReasoningParserManager"],
    "vllm.renderers": ["renderer_from_config"],
    "vllm.renderers.inputs.preprocess": ["extract_prompt_components", "parse_model_prompt"],
    "vllm.sampling_params": ["RequestOutputKind", "SamplingParams", "StructuredOutputsParams"],
    "vllm.tool_parsers": ["ToolParserManager"],
    "vllm.usage.usage_lib": ["UsageContext"],
    "vllm.utils.argparse_utils": ["FlexibleArgumentParser"],
    "vllm.v1.core.sched.output": ["SchedulerOutput"],
    "vllm.v1.engine": ["EngineCoreEventType", "EngineCoreOutput", "EngineCoreRequest", "FinishReason"],
    "vllm.v1.engine.async_llm": ["AsyncLLM"],
    "vllm.v1.engine.exceptions": ["EngineDeadError", "EngineGenerateError"],
    "vllm.v1.engine.input_processor": ["InputProcessor"],
    "vllm.v1.engine.output_processor": ["OutputProcessor", "OutputProcessorOutput", "RequestOutputCollector"],
    "vllm.v1.engine.parallel_sampling": ["ParentRequest"],
    "vllm.v1.kv_cache_interface": ["KVCacheConfig"],
    "vllm.v1.metrics.loggers": ["PrometheusStatLogger", "StatLoggerBase"],
    "vllm.v1.metrics.stats": ["PrefillStats"],
    "vllm.v1.outputs": ["KVConnectorOutput", "LogprobsLists", "LogprobsTensors"],
    "vllm.v1.request": ["Request"],
    "vllm.version": ["__version__"],
}

# "module:owner.callable" -> its parameters, in order. What we call or override must keep them.
SIGNATURES = {
    "vllm.v1.engine.async_llm:AsyncLLM.from_engine_args": [
        "engine_args", "start_engine_loop", "usage_context", "stat_loggers",
    ],
    "vllm.v1.engine.async_llm:AsyncLLM.add_request": [
        "self", "request_id", "prompt", "params", "arrival_time", "lora_request", "tokenization_kwargs",
        "trace_headers", "priority", "data_parallel_rank", "session_id", "prompt_text", "reasoning_ended",
        "reasoning_parser_kwargs", "kv_hints",
    ],
    "vllm.v1.engine.async_llm:AsyncLLM.abort": ["self", "request_id", "internal"],
    # engine/vllm_steps.py stands where this class stands in AsyncLLM.
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": [
        "self", "request", "prompt", "parent_req", "request_index", "queue",
    ],
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": [
        "self", "engine_core_outputs", "engine_core_timestamp", "iteration_stats", "weight_version",
    ],
    "vllm.v1.engine.output_processor:OutputProcessor.abort_requests": ["self", "request_ids", "internal"],
    "vllm.v1.engine.output_processor:OutputProcessor.propagate_error": ["self", "e"],
    "vllm.v1.engine.async_llm:AsyncLLM.notify_kv_transfer_request_rejected": [
        "self", "request_id", "kv_transfer_params", "data_parallel_rank",
    ],
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown": ["self", "timeout"],
    "vllm.v1.engine.async_llm:AsyncLLM.check_health": ["self"],
    "vllm.v1.engine.async_llm:AsyncLLM.is_sleeping": ["self"],
    "vllm.inputs.engine:tokens_input": ["prompt_token_ids", "prompt", "cache_salt"],
    "vllm.v1.metrics.loggers:StatLoggerBase.record": [
        "self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx",
    ],
    f"{NIXL}.connector:NixlBaseConnector.__init__": ["self", "vllm_config", "role", "kv_cache_config"],
    f"{NIXL}.connector:NixlPullConnector.build_kv_connector_stats": ["data"],
    f"{NIXL}:NixlPullConnectorScheduler.__init__": ["self", "vllm_config", "engine_id", "kv_cache_config"],
    f"{NIXL}:NixlPullConnectorScheduler.get_num_new_matched_tokens": ["self", "request", "num_computed_tokens"],
    f"{NIXL}:NixlPullConnectorScheduler.request_finished": ["self", "request", "block_ids"],
    f"{NIXL}:NixlPullConnectorScheduler.build_connector_meta": ["self", "scheduler_output"],
    f"{NIXL}:NixlPullConnectorScheduler.update_connector_output": ["self", "connector_output"],
    f"{NIXL}:NixlPullConnectorWorker.__init__": ["self", "vllm_config", "engine_id", "kv_cache_config"],
    f"{NIXL}:NixlPullConnectorWorker.start_load_kv": ["self", "metadata"],
    f"{NIXL}:NixlPullConnectorWorker.get_transfer_results": ["self"],
    f"{NIXL}:NixlPullConnectorWorker._get_new_notifs": ["self"],
    f"{NIXL}:NixlPullConnectorWorker._nixl_handshake": [
        "self", "host", "port", "remote_tp_size", "expected_engine_id", "remote_dcp_size", "remote_pp_size",
        "notif_agents_only",
    ],
}  # fmt: skip

# Attributes without a signature that we read or write, by the source that must mention them.
ATTRIBUTES = {
    f"{NIXL}.base_scheduler:NixlBaseConnectorScheduler": [
        "self._reqs_need_send", "self.side_channel_host", "self.side_channel_port",
    ],
    f"{NIXL}.base_worker:NixlBaseConnectorWorker": [
        "self._reqs_to_process", "self._reqs_to_send", "self.xfer_stats", "self.consumer_notification_counts_by_req",
        "self.expected_consumer_notifications_by_req",
        # What NIXL reads blocks from, and how a pull is told as failed.
        "self.kv_caches_base_addr[self.engine_id][self.tp_rank]", "self.block_len_per_layer",
        "self.block_stride_per_layer", "self.region_num_blocks", "self._physical_blocks_per_logical_kv_block",
        "self.use_host_buffer", "self._mixed_mem_types", "self._has_mamba", "self.enable_permute_local_kv",
        "self._invalid_block_ids.put(", "self._is_hma_required", "failed_recving=failed_recv_reqs",
        "self.device_kv_caches",
    ],
    "vllm.v1.engine.async_llm:AsyncLLM": [
        "self.output_handler", "self.vllm_config", "def errored", "self.output_processor = OutputProcessor(",
        "output_processor = self.output_processor", "output_processor.process_outputs(", "self.logger_manager",
    ],
    # Whose socket we read in our own way (engine/quick_receive.py).
    "vllm.v1.engine.core_client:AsyncMPClient": [
        "output_socket = resources.output_socket", "await output_socket.recv_multipart(copy=False)",
    ],
    # Whose refusals we put into Baton's words (front_proxy/openai_app.py).
    "vllm.renderers.online_renderer:OnlineRenderer": [
        "def create_error_response(\n        self,\n        message:", "return self.create_error_response(",
    ],
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state": [
        "state.online_renderer = OnlineRenderer(",
    ],
    # Whose classes we load where vLLM would start a process for it (engine/vllm_args.py).
    "vllm.model_executor.models.registry:_ModelRegistry": ["models: dict[str,", "_RegisteredModel.from_model_cls("],
    "vllm.model_executor.models.registry:_BaseRegisteredModel": ["def load_model_cls(self)"],
    "vllm.v1.metrics.loggers:StatLoggerManager": ["self.stat_loggers"],
    "vllm.v1.metrics.stats:SchedulerStats": [
        "kv_cache_usage", "num_running_reqs", "num_waiting_reqs", "num_skipped_waiting_reqs", "kv_connector_stats",
    ],
    "vllm.v1.metrics.stats:PrefillStats": [
        "num_computed_tokens", "num_cached_tokens", "num_local_cached_tokens", "num_external_cached_tokens",
    ],
    "vllm.v1.metrics.stats:IterationStats": ["self.num_generation_tokens"],
    "vllm.v1.engine:EngineCoreOutput": [
        "request_id", "new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "finish_reason", "stop_reason",
        "events", "kv_transfer_params", "prefill_stats",
    ],
}  # fmt: skip

ENGINE_ARGS = {
    "model", "dtype", "trust_remote_code", "block_size", "enforce_eager", "tensor_parallel_size", "max_num_seqs",
    "seed", "enable_prefix_caching", "prefix_caching_hash_algo", "disable_log_stats", "enable_log_requests",
    "kv_transfer_config", "served_model_name", "tokenizer", "max_model_len", "max_num_batched_tokens",
    "kv_cache_memory_bytes",
}  # fmt: skip


def is_vllm(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] == "vllm"


def find(path: str) -> object:
    module, _, names = path.partition(":")
    found: object = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def test_this_is_the_version_the_surface_was_written_against() -> None:
    assert str(find("vllm.version:__version__")).split("+")[0] == "0.32.0"


def test_every_name_we_import_stands_here() -> None:
    imported: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and is_vllm(str(node.module)):
                    imported.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
                if isinstance(node, ast.Import):
                    # A bare module's attributes would escape this test; its version is all that is read of it.
                    assert {alias.name for alias in node.names if is_vllm(alias.name)} <= {"vllm"}, path
    assert {module: sorted(names) for module, names in imported.items()} == NAMES


@pytest.mark.parametrize("module", sorted(NAMES))
def test_the_names_we_import_exist(module: str) -> None:
    loaded = importlib.import_module(module)
    missing = [name for name in NAMES[module] if getattr(loaded, name, None) is None]
    assert not missing


@pytest.mark.parametrize("path", sorted(SIGNATURES))
def test_what_we_call_or_override_takes_what_it_took(path: str) -> None:
    assert list(inspect.signature(find(path)).parameters) == SIGNATURES[path]  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted(ATTRIBUTES))
def test_the_attributes_we_touch_are_still_there(path: str) -> None:
    source = inspect.getsource(find(path))  # type: ignore[arg-type]
    assert not [attribute for attribute in ATTRIBUTES[path] if attribute not in source]


def test_the_engine_arguments_we_set_exist() -> None:
    fields = find("vllm.engine.arg_utils:AsyncEngineArgs").__dataclass_fields__  # type: ignore[attr-defined]
    assert not ENGINE_ARGS - set(fields)


def test_an_engine_client_must_implement_what_we_implement() -> None:
    wanted = {
        "abort", "add_lora", "check_health", "dead_error", "do_log_stats", "encode", "errored", "generate",
        "is_paused", "is_running", "is_sleeping", "is_stopped", "is_tracing_enabled",
        "notify_kv_transfer_request_rejected", "pause_generation", "release_kv_cache_memory", "reset_encoder_cache",
        "reset_mm_cache", "reset_prefix_cache", "resume_generation", "shutdown", "sleep", "start_profile",
        "stop_profile", "wake_up",
    }  # fmt: skip
    actual = set(find("vllm.engine.protocol:EngineClient").__abstractmethods__)  # type: ignore[attr-defined]
    assert actual == wanted


def test_a_ping_is_answered_by_the_loop_that_steps_and_every_step_is_told() -> None:
    """That an engine stands still is told by silence: from its steps' statistics, and from this call."""
    source = inspect.getsource(find("vllm.v1.engine.async_llm:AsyncLLM.is_sleeping"))  # type: ignore[arg-type]
    assert "self.engine_core.is_sleeping_async()" in source
    loop = inspect.getsource(find("vllm.v1.engine.core:EngineCoreProc"))  # type: ignore[arg-type]
    assert loop.index("self._process_input_queue()") < loop.index("self._process_engine_step()")
    step = inspect.getsource(find("vllm.v1.core.sched.scheduler:Scheduler.update_from_output"))  # type: ignore[arg-type]
    assert "We must return the stats even if there are no request" in step


def test_a_preaborted_request_still_reaches_the_connector() -> None:
    """Release by message rests on this one branch of the engine core."""
    source = inspect.getsource(find("vllm.v1.engine.core:EngineCore.add_request"))  # type: ignore[arg-type]
    assert "abort_immediately" in source
    assert "abort_requests" in source


def test_the_handshake_listener_still_looks_its_answers_up_by_what_it_was_sent() -> None:
    source = inspect.getsource(find(f"{NIXL}.base_scheduler:NixlBaseConnectorScheduler"))  # type: ignore[arg-type]
    assert "target=self._nixl_handshake_listener" in source
    assert "msg, target_pp_rank, target_tp_rank = msgspec.msgpack.decode(msg)" in source
    assert "encoded_data[(target_pp_rank, target_tp_rank)]" in source


def test_blocks_are_freed_only_after_the_connector_heard_of_it() -> None:
    source = inspect.getsource(find("vllm.v1.core.sched.scheduler:Scheduler._update_from_kv_xfer_finished"))  # type: ignore[arg-type]
    assert source.index("self.connector.update_connector_output(") < source.index("self._free_blocks(")


def test_the_nixl_wrapper_still_needs_its_progress_thread_calmed() -> None:
    """When NIXL stops writing 0 here, kv_transfer.nixl_worker.progress_delay can go."""
    wrapper = find("vllm.distributed.nixl_utils:NixlWrapper")
    assert "pthrDelay = 0" in inspect.getsource(wrapper.__init__)  # type: ignore[misc]


def test_the_cpu_platform_still_wants_a_variable_before_it_runs_without_a_worker_process() -> None:
    """When vLLM stops asking for it, engine.vllm_args need not set it."""
    platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    source = inspect.getsource(platform.check_and_update_config)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in source
    assert 'distributed_executor_backend == "uni"' in source
