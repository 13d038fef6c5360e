"""Every vLLM name that we touch, compared with what the code imports. An upgrade of vLLM fails here first.

``docs/upstream.md`` says of each private touch why it is there and when it can go.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from types import ModuleType
from typing import Any

import pytest

from engine.preflight import VLLM_VERSION
from tests.test_repository import PACKAGES, ROOT

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"

# "module:owner.callable" -> its parameters, in order, of what we override. What we call, the engine contract calls.
SIGNATURES = {
    # What kv_transfer/offload/ overrides, beside what vLLM's abstract classes name.
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:OffloadingConnectorScheduler.__init__": (
        "self, spec, vllm_config, kv_cache_config"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:OffloadingConnectorScheduler"
    ".get_num_new_matched_tokens": "self, request, num_computed_tokens, max_num_new_tokens",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:OffloadingConnectorScheduler"
    ".update_state_after_alloc": "self, request, blocks, num_external_tokens",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:OffloadingConnectorScheduler"
    ".on_new_request": "self, request",
    "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector"
    ".bind_gpu_block_pool": "self, gpu_block_pool",
    "vllm.v1.core.block_pool:BlockPool.get_cached_block": "self, block_hash, kv_cache_group_ids",
    "vllm.v1.kv_offload.base:OffloadingWorker.submit_load": "self, job_id, src_spec, dst_spec",
    "vllm.v1.kv_offload.base:OffloadingWorker.submit_store": "self, job_id, src_spec, dst_spec",
    "vllm.v1.kv_offload.base:OffloadingManager.prepare_load": "self, keys, req_context",
    "vllm.v1.kv_offload.base:OffloadingManager.prepare_store": "self, keys, req_context",
    "vllm.v1.kv_offload.base:OffloadingManager.complete_store": "self, keys, req_context, success",
    "vllm.v1.kv_offload.base:OffloadingManager.lookup": "self, key, req_context",
    # The fast path hands the first arguments to them in another form, and all others on.
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator": (
        "self, request, result_generator, request_id, model_name, conversation, tokenizer, request_metadata, "
        "chat_template_kwargs, mm_token_counts"
    ),
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.completion_stream_generator": (
        "self, request, engine_inputs, result_generator, request_id, created_time, model_name, num_prompts, "
        "tokenizer, request_metadata"
    ),
    # engine/vllm/steps.py takes the place of this class in AsyncLLM.
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": (
        "self, request, prompt, parent_req, request_index, queue"
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": (
        "self, engine_core_outputs, engine_core_timestamp, iteration_stats, weight_version"
    ),
    "vllm.v1.engine.output_processor:OutputProcessor.abort_requests": "self, request_ids, internal",
    "vllm.v1.engine.output_processor:OutputProcessor.propagate_error": "self, e",
    "vllm.v1.metrics.loggers:StatLoggerBase.record": (
        "self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx"
    ),
    # engine/vllm/step_meter.py measures between them.
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "self, scheduler_output, model_runner_output",
    # front_proxy/engine_client/parsers.py puts parsers of its own in their place.
    "vllm.tool_parsers:ToolParserManager.register_module": "name, force, module",
    "vllm.reasoning:ReasoningParserManager.register_module": "name, force, module",
    # What the front proxy's collector overrides.
    "vllm.v1.engine.output_processor:RequestOutputCollector.__init__": "self, output_kind, request_id",
    "vllm.v1.engine.output_processor:RequestOutputCollector.put": "self, output",
    "vllm.v1.structured_output.backend_types:StructuredOutputBackend.compile_grammar": (
        "self, request_type, grammar_spec, stop_token_ids"
    ),
    f"{NIXL}.connector:NixlBaseConnector.__init__": "self, vllm_config, role, kv_cache_config",
    f"{NIXL}.connector:NixlPullConnector.build_kv_connector_stats": "data",
    f"{NIXL}:NixlPullConnectorScheduler.__init__": "self, vllm_config, engine_id, kv_cache_config",
    f"{NIXL}:NixlPullConnectorScheduler.get_num_new_matched_tokens": "self, request, num_computed_tokens",
    f"{NIXL}:NixlPullConnectorScheduler.request_finished": "self, request, block_ids",
    f"{NIXL}:NixlPullConnectorScheduler.build_connector_meta": "self, scheduler_output",
    f"{NIXL}:NixlPullConnectorScheduler.set_xfer_handshake_metadata": "self, metadata",
    f"{NIXL}:NixlPullConnectorScheduler.update_connector_output": "self, connector_output",
    f"{NIXL}:NixlPullConnectorWorker.__init__": "self, vllm_config, engine_id, kv_cache_config",
    f"{NIXL}:NixlPullConnectorWorker.start_load_kv": "self, metadata",
    f"{NIXL}:NixlPullConnectorWorker.get_transfer_results": "self",
    f"{NIXL}:NixlPullConnectorWorker._get_new_notifs": "self",
    f"{NIXL}:NixlPullConnectorWorker._nixl_handshake": (
        "self, host, port, remote_tp_size, expected_engine_id, remote_dcp_size, remote_pp_size, notif_agents_only"
    ),
    f"{NIXL}.base_scheduler:NixlBaseConnectorScheduler._nixl_handshake_listener": (
        "encoded_data, ready_event, stop_event, host, port"
    ),
}

SCHEDULER_HALF = f"{NIXL}.base_scheduler:NixlBaseConnectorScheduler"
WORKER_HALF = f"{NIXL}.base_worker:NixlBaseConnectorWorker"
CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1"
TIER_SCHEDULER_HALF = f"{CONNECTORS}.offloading.scheduler:OffloadingConnectorScheduler"
TIER_WORKER_HALF = f"{CONNECTORS}.offloading.worker:OffloadingConnectorWorker"
OFFLOADING = "vllm.v1.kv_offload"
ASYNC_LLM = "vllm.v1.engine.async_llm:AsyncLLM"

# module -> function -> where vLLM has what it touches -> the attributes, which no other file of ours may name.
PRIVATE: dict[str, dict[str, dict[str, str]]] = {
    "engine.vllm.private": {
        "replace_output_processor": {ASYNC_LLM: "output_processor output_handler"},
        "hear_steps_first": {"vllm.v1.engine.core_client:AsyncMPClient": "get_output_async"},
        "receive_fast": {"vllm.v1.engine.core_client:AsyncMPClient": "resources output_socket"},
        "remove_prometheus": {
            ASYNC_LLM: "logger_manager",
            "vllm.v1.metrics.loggers:StatLoggerManager": "stat_loggers",
        },
        "stop_output_loop": {ASYNC_LLM: "output_handler"},
        "grammar_backend": {"vllm.sampling_params:StructuredOutputsParams": "_backend"},
        "grammar_error": {"vllm.v1.structured_output.backend_guidance:GuidanceGrammar": "ll_matcher get_error"},
        "register_loaded": {
            "vllm.model_executor.models.registry:_ModelRegistry": "models",
            "vllm.model_executor.models.registry:_BaseRegisteredModel": "load_model_cls",
        },
        "tell_connector": {ASYNC_LLM: "notify_kv_transfer_request_rejected"},
        "measure_steps": {
            "vllm.v1.core.sched.scheduler:Scheduler": "schedule update_from_output make_stats has_unfinished_requests",
        },
        "take_grammars_as_decided": {
            ASYNC_LLM: "input_processor",
            "vllm.v1.engine.input_processor:InputProcessor": "structured_outputs_config",
        },
        "keep_every_grammar_backend": {
            "vllm.v1.structured_output:StructuredOutputManager": (
                "backend tokenizer vllm_config grammar_init _create_grammar"
            ),
            "vllm.v1.structured_output.backend_types:StructuredOutputBackend": "allocate_token_bitmask destroy",
            "vllm.v1.structured_output.backend_types:StructuredOutputGrammar": "fill_bitmask",
            "vllm.sampling_params:StructuredOutputsParams": "_backend",
        },
    },
    "front_proxy.engine_client.private": {
        "default_reasoning_config": {"vllm.engine.arg_utils:EngineArgs": "_set_default_reasoning_config_args"},
        "reserve_no_kv_memory": {"vllm.platforms.cpu:CpuPlatform": "VLLM_CPU_KVCACHE_SPACE"},
        "reword_refusals": {"vllm.renderers.online_renderer:OnlineRenderer": "create_error_response"},
        "forget_parent": {"vllm.v1.engine.output_processor:OutputProcessor": "parent_requests"},
        "encodes_as_usual": {"transformers:PreTrainedTokenizerBase.__call__": "_encode_plus _switch_to_input_mode"},
        "forget_deprecations": {
            "pydantic._internal._model_construction:set_deprecated_descriptors": "_DeprecatedFieldDescriptor"
        },
        "wrap_tokenizing": {"vllm.renderers:BaseRenderer": "_tokenize_prompt"},
        "has_usual_templates": {"transformers:PreTrainedTokenizerBase": "apply_chat_template"},
        "wrap_templates": {"vllm.renderers.hf:HfRenderer.render_messages": "safe_apply_chat_template"},
        "template_options": {
            "vllm.renderers.hf:safe_apply_chat_template": "resolve_chat_template resolve_chat_template_kwargs",
            "transformers:PreTrainedTokenizerBase.apply_chat_template": "special_tokens_map",
        },
        "template_of": {
            "transformers.utils.chat_template_utils:render_jinja_template": "_compile_jinja_template",
        },
        "plain_content": {
            "vllm.renderers.hf:HfRenderer.render_messages": (
                "parse_chat_messages resolve_chat_template_content_format enable_prompt_embeds"
            ),
        },
        "is_changed": {
            "vllm.renderers.chat_utils:_parse_chat_message_content": "_strip_claude_code_billing_header",
        },
    },
    "kv_transfer.nixl.private": {
        "init_without_halves": {f"{NIXL}.connector:NixlBaseConnector": "__init__"},
        "copy_metadata": {},
        "serve_handshakes": {SCHEDULER_HALF: "_nixl_handshake_listener"},
        "set_lease_end": {SCHEDULER_HALF: "_reqs_need_send"},
        "prefill_backoff": {SCHEDULER_HALF: "_prefill_backoff"},
        "layout_facts": {f"{NIXL}.metadata:NixlHandshakePayload": "compatibility_hash agent_metadata_bytes"},
        "progress_delay": {},  # of NIXL; a test of its own below
        "block_regions": {
            WORKER_HALF: "kv_caches_base_addr block_len_per_layer block_stride_per_layer region_num_blocks "
            "_physical_blocks_per_logical_kv_block use_host_buffer _mixed_mem_types _has_mamba enable_permute_local_kv"
        },
        "is_tracked": {WORKER_HALF: "_reqs_to_process"},
        "extend_lease": {WORKER_HALF: "_reqs_to_send"},
        "stop_tracking": {WORKER_HALF: "_reqs_to_process _reqs_to_send"},
        "tracked": {WORKER_HALF: "_reqs_to_process"},
        "forget_notifications": {
            WORKER_HALF: "consumer_notification_counts_by_req expected_consumer_notifications_by_req"
        },
        "report_load_failure": {WORKER_HALF: "_is_hma_required _invalid_block_ids"},
    },
    "kv_transfer.offload.private": {
        "init_without_halves": {f"{CONNECTORS}.offloading_connector:OffloadingConnector": "_canonical_layout"},
        "note_finished": {TIER_WORKER_HALF: "_load_jobs _connector_worker_meta"},
        "store_again": {TIER_SCHEDULER_HALF: "_req_status group_states next_stored_chunk_idx"},
        "context_of": {TIER_SCHEDULER_HALF: "_req_status req_context"},
        "name_blocks": {TIER_SCHEDULER_HALF: "_req_status update_offload_keys group_states offload_keys"},
        "keys_of": {"vllm.v1.kv_offload.base:ReqContext": "_offload_key_positions"},
        "region": {f"{OFFLOADING}.cpu.spec:CPUOffloadingSpec.create_worker": "_all_workers_barrier"},
    },
}

# Further source that we rely on, by the class or function that must contain it, and in this order.
SOURCE = {
    # kv_transfer.offload: a load and a store list blocks and slots in one order, a store defers to the next step, and
    # what the worker half reports is taken in before a request that failed is scheduled again.
    TIER_SCHEDULER_HALF: [
        "src_spec = self.manager.prepare_load(keys_to_load, req_status.req_context)",
        "store_output = self.manager.prepare_store(",
        "if offload_key not in keys_to_store:",
        "self.manager.complete_store(job_status.keys, req_status.req_context)",
        "self.manager.complete_load(job_status.keys, req_status.req_context)",
    ],
    TIER_WORKER_HALF: ["assert transfer_result.success"],
    # Why no file in /dev/shm is left behind.
    f"{OFFLOADING}.cpu.shared_offload_region:SharedOffloadRegion": [
        "Every worker has mapped the file once the barrier releases",
        "Unlinked mmap file",
    ],
    SCHEDULER_HALF: [
        "self.side_channel_host",
        "self.side_channel_port",
        "target=self._nixl_handshake_listener",
        # The listener looks its replies up by what it was sent: ours are in the same dict.
        "msg, target_pp_rank, target_tp_rank = msgspec.msgpack.decode(msg)",
        "encoded_data[(target_pp_rank, target_tp_rank)]",
    ],
    WORKER_HALF: [
        "self.device_kv_caches",
        # What kv_transfer.nixl.worker.cores_kept undoes.
        "os.sched_setaffinity(0, rsv_cores_for_kv)",
        "self.xfer_stats",
        # What kv_transfer.nixl.private.layout_facts reads before any handshake.
        "compute_nixl_compatibility_hash(",
        "self.kv_caches_base_addr[self.engine_id][self.tp_rank]",
        "encoder.encode(agent_metadata)",
        "self._invalid_block_ids.put(",
        "failed_recving=failed_recv_reqs",
    ],
    ASYNC_LLM: [
        "self.vllm_config",
        "self.output_processor = OutputProcessor(",
        "output_processor = self.output_processor",
        "output_processor.process_outputs(",
        "def errored",
    ],
    # Whose socket engine/vllm/fast_receiver.py reads.
    "vllm.v1.engine.core_client:AsyncMPClient": [
        "output_socket = resources.output_socket",
        "await output_socket.recv_multipart(copy=False)",
    ],
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state": ["state.online_renderer = OnlineRenderer("],
    # The layers that front_proxy.openai_api.answer_headers takes out of the app.
    "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware": [
        "CORSMiddleware,\n        allow_origins=args.allowed_origins",
        "app.add_middleware(XRequestIdMiddleware)",
    ],
    # front_proxy/engine_client/rendering.py: what blocks does the same as what does not.
    "vllm.renderers:BaseRenderer.render_cmpl": [
        "dict_prompts = self.render_prompts(prompts)",
        "tok_prompts = self.tokenize_prompts(dict_prompts, tok_params)",
        "self._apply_prompt_extras(tok_prompts, prompt_extras)",
        "self.process_for_engine(",
    ],
    # What a template gets of a chat's options, and which chats are changed before it.
    "vllm.renderers.hf:safe_apply_chat_template": [
        "chat_template = resolve_chat_template(",
        'msg["role"] == "developer"',
        "resolved_kwargs = resolve_chat_template_kwargs(",
        "plain = tokenizer.apply_chat_template(",
    ],
    # What is done with a message that has a role and a text alone, and with a rendered chat.
    "vllm.renderers.chat_utils:_parse_chat_message_content": [
        'if role == "system":',
        "_strip_claude_code_billing_header(content)",
        "_parse_chat_message_content_parts(",
    ],
    "vllm.renderers.base:BaseRenderer.render_chat": [
        "self.render_messages(conversation, chat_params)",
        "self.tokenize_prompts(dict_prompts, tok_params)",
    ],
    "transformers.utils.chat_template_utils:render_jinja_template": [
        "compiled_template = _compile_jinja_template(chat_template)",
        "rendered_chat = compiled_template.render(",
    ],
    # front_proxy/openai_api/fast_path/request_forms.py: what of a request is asked with its prompt, and what without.
    "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat": [
        "renderer = self.renderer",
        "await renderer.render_chat_async(",
    ],
    "vllm.renderers:BaseRenderer._tokenize_prompt": [
        "kwargs = params.get_encode_kwargs()",
        'encoding = tokenizer(prompt["prompt"], **kwargs)',
        "return self._build_tokens_prompt(",
    ],
    "vllm.v1.metrics.stats:IterationStats": ["self.num_generation_tokens"],
    # An engine that stands still is told by its silence: its loop answers this call, and tells of every step.
    "vllm.v1.engine.async_llm:AsyncLLM.is_sleeping": ["self.engine_core.is_sleeping_async()"],
    "vllm.v1.engine.core:EngineCoreProc": ["self._process_input_queue()", "self._process_engine_step()"],
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": [
        "We must return the stats even if there are no request"
    ],
    # Release by message rests on this branch of the engine core.
    "vllm.v1.engine.core:EngineCore.add_request": ["abort_immediately", "abort_requests"],
    # Blocks are freed only after the connector heard of it.
    "vllm.v1.core.sched.scheduler:Scheduler._update_from_kv_xfer_finished": [
        "self.connector.update_connector_output(",
        "self._free_blocks(",
    ],
    # An engine with a back-off computes less than the prompt, and its one token follows on that.
    f"{SCHEDULER_HALF}._truncate_request_for_prefill": [
        "backoff = self._prefill_backoff()",
        "del request.prompt_token_ids[-backoff:]",
        "request.max_tokens = 1",
    ],
    # A front proxy's choice of a grammar backend is final where this finds no configuration.
    "vllm.v1.engine.input_processor:InputProcessor": ["params.verify(", "self.structured_outputs_config,"],
    "vllm.sampling_params:SamplingParams._validate_structured_outputs": ["if structured_outputs_config is None or"],
    # What a copy of the manager for each backend rests on.
    "vllm.v1.structured_output:StructuredOutputManager.grammar_init": [
        "if self.backend is None:",
        *(f'backend == "{name}"' for name in ("xgrammar", "guidance", "outlines", "lm-format-enforcer")),
        "self.executor.submit(self._create_grammar, request)",
        "request.structured_output_request.grammar = grammar",
    ],
    "vllm.v1.structured_output:StructuredOutputManager.grammar_bitmask": ["self.backend.allocate_token_bitmask("],
    "vllm.v1.engine.core:EngineCore.__init__": [
        "self.structured_output_manager = StructuredOutputManager(vllm_config)",
        "structured_output_manager=self.structured_output_manager,",
    ],
    # The engine core keeps the words about a bad grammar to its log, and engine/vllm/grammar.py asks for them again.
    "vllm.v1.structured_output:StructuredOutputManager._create_grammar": [
        "self.backend.compile_grammar(",
        '"Failed to compile grammar for request %s", request.request_id',
    ],
    # A parser is made for each request that it reads, before the first token is asked for.
    "vllm.parser.abstract_parser:Parser.__init__": [
        "self.__class__.reasoning_parser_cls(",
        "self.__class__.tool_parser_cls(",
    ],
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat._create_chat_completion": [
        "self._make_parser(",
        "max_tokens = get_max_tokens(",
        "self.engine_client.generate(",
        "return self.chat_completion_stream_generator(",
    ],
    "vllm.v1.engine.output_processor:RequestOutputCollector": ["self.ready = asyncio.Event()"],
    # When NIXL's wrapper stops writing 0, kv_transfer.nixl.private.progress_delay can go.
    "vllm.distributed.nixl_utils:NixlWrapper.__init__": ["pthrDelay = 0"],
    # engine/vllm/node.py runs the ranks of a further node in this way.
    "vllm.entrypoints.cli.serve:run_headless": [
        "executor = MultiprocExecutor(vllm_config, monitor_workers=False)",
        "executor.start_worker_monitor(inline=True)",
    ],
    # When vLLM stops asking for the variable, engine.vllm.args need not set it.
    "vllm.platforms.cpu:CpuPlatform.check_and_update_config": [
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        'distributed_executor_backend == "uni"',
    ],
}


def find(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def test_this_is_the_version_the_surface_was_written_against() -> None:
    assert str(find("vllm.version:__version__")).split("+")[0] == VLLM_VERSION


def _has(loaded: ModuleType, name: str) -> bool:
    """Also a module of a package, which is no attribute of it before it is imported."""
    return hasattr(loaded, name) or importlib.util.find_spec(f"{loaded.__name__}.{name}") is not None


def test_every_name_we_import_exists() -> None:
    """Also those that are imported where they are used, or for types alone."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and str(node.module).split(".", maxsplit=1)[0] == "vllm":
                    loaded = importlib.import_module(str(node.module))
                    assert not [alias.name for alias in node.names if not _has(loaded, alias.name)], path
                if isinstance(node, ast.Import):
                    # A bare module's attributes would escape this test.
                    assert not [alias.name for alias in node.names if alias.name.startswith("vllm.")], path


@pytest.mark.parametrize("path", sorted(SIGNATURES))
def test_what_we_call_or_override_takes_what_it_took(path: str) -> None:
    assert ", ".join(inspect.signature(find(path)).parameters) == SIGNATURES[path]


@pytest.mark.parametrize("path", sorted(SOURCE))
def test_the_source_we_rely_on_is_still_there(path: str) -> None:
    source = inspect.getsource(find(path))
    at = [source.find(text) for text in SOURCE[path]]
    assert -1 not in at and at == sorted(at), list(zip(SOURCE[path], at, strict=True))


@pytest.mark.parametrize("module", sorted(PRIVATE))
def test_every_private_touch_is_a_function_that_is_documented_and_finds_what_it_touches(module: str) -> None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, FUNCTIONS)]
    assert {function.name for function in functions} == PRIVATE[module].keys()
    upstream = (ROOT / "docs/upstream.md").read_text()
    for function in functions:
        assert ast.get_docstring(function), function.name
        assert f"`{function.name}`" in upstream, function.name
        for owner, attributes in PRIVATE[module][function.name].items():
            source = inspect.getsource(find(owner))
            assert not [name for name in attributes.split() if name not in source], (owner, attributes)


def test_no_other_file_names_what_the_private_files_touch() -> None:
    touched = {
        name
        for functions in PRIVATE.values()
        for owners in functions.values()
        for attributes in owners.values()
        for name in attributes.split()
    } - {
        "__init__",
        "allocate_token_bitmask",
        "backend",
        "fill_bitmask",
        "input_processor",
        "models",
        "output_processor",
        "resources",
        "structured_outputs_config",
        "tokenizer",
        "vllm_config",
        "_nixl_handshake_listener",
        "notify_kv_transfer_request_rejected",
    }
    for package in ("engine", "front_proxy", "kv_transfer"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "private.py":
                named = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
                assert not named & touched, path
