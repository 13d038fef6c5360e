"""Turns an EngineConfig into vLLM's engine arguments and environment. Starts nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from engine.config import LIMITS, EngineConfig
from engine.preflight import CONNECTOR_SETTINGS, cpu_share, runs_on_cpu
from kv_transfer.nixl.ucx_log import without_tcp
from kv_transfer.tiers.config import Tier

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

_GIB = 1 << 30
_CPU_KV_CACHE_BYTES = _GIB
# A port behind a free one is rarely taken.
_PORT_TRIES_MAX = 20


class EventAddresses(NamedTuple):
    """Where an engine publishes its KV events, and where it repeats the last of them."""

    batches: str
    replay: str

    def of_rank(self, rank: int) -> EventAddresses:
        """Where a data-parallel rank does: vLLM adds this to the first one's name, if "inproc" stands in it."""
        return EventAddresses(*[f"{name}_dp{rank}" for name in self]) if rank else self


class SideChannelAddress(NamedTuple):
    """Where an engine offers its NIXL metadata: the host it tells others, and the address of this machine it binds."""

    host: str
    bind_address: str
    port: int


def prepare_environment(config: EngineConfig, environ: MutableMapping[str, str] | None = None) -> None:
    """Set what vLLM, OpenMP and UCX read from the environment. Call it before anything imports vllm or torch.

    What the operator has set stays as it is, but for TCP where another transport is required.
    """
    environ = os.environ if environ is None else environ
    # The engine process would otherwise inherit the event loop's locks and gRPC's threads half alive.
    environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.transport_required:
        environ["UCX_TLS"] = without_tcp(environ.get("UCX_TLS", ""))
    elif runs_on_cpu(environ):
        environ.setdefault("UCX_TLS", LIMITS.ucx_tls)
    environ.setdefault("OMP_NUM_THREADS", str(config.cpu_threads or cpu_share(2)))
    # Engines share cores with each other and the front proxy: leave the placing of threads to the kernel.
    environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if runs_eagerly(config, on_cpu=runs_on_cpu(environ)):
        # vLLM compiles some sampler code even then: the first request for logprobs would wait 20 s for a compiler.
        environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # Idle OpenMP threads that spin would take the other engines' cores.
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if runs_in_one_process(config):
        # vLLM's CPU platform turns "uni" back into "mp" unless this is 0. AsyncLLM's engine has a process of its own
        # all the same: the variable only speaks of vLLM's synchronous engine.
        environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    on_one_machine = config.args.get("nnodes", 1) == 1
    if config.tensor_parallel_size * config.data_parallel_size > 1 and on_one_machine and runs_on_cpu(environ):
        # Their collectives need no other address.
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    # Blocks are known by their whole hashes in its events, or two of them could have one name.
    environ.setdefault("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")


def runs_eagerly(config: EngineConfig, *, on_cpu: bool) -> bool:
    """Whether vLLM runs the model without compiling it: the setting, or on CPU where nothing says how to compile."""
    if config.enforce_eager is not None:
        return config.enforce_eager
    return on_cpu and "compilation_config" not in config.args


def load_model_class(model: str) -> None:
    """On CPU, import the class of the model in the folder ``model``, so that vLLM finds it when it asks what it can do.

    vLLM keeps CUDA out of this process and asks in another one, which imports all of vLLM anew: 10 s of CPU for each
    worker and front proxy, where nothing is cached. Here it takes one.
    """
    if not runs_on_cpu(os.environ) or not (about := Path(model, "config.json")).is_file():
        return
    from engine.vllm import private

    for name in json.loads(about.read_bytes()).get("architectures") or ():
        private.register_loaded(name)


def runs_in_one_process(config: EngineConfig) -> bool:
    """Whether the engine core runs the model itself, on CPU, instead of handing each step to a worker process.

    vLLM's hand-over spins for a second after every step, in both processes. Two engines on two cores then wait for
    each other's spinning: hand-offs took up to 30 s (measured), and each engine held 400 MB of shared memory.
    """
    return config.tensor_parallel_size == 1 and "distributed_executor_backend" not in config.args


@contextlib.contextmanager
def held_ports(host: str, count: int = 1) -> Iterator[tuple[str, int]]:
    """The numeric address of ``host`` and the first of ``count`` free ports in a row there, for a rank each.

    The kernel gives them to no other process meanwhile, and one process may listen on each. Raises OSError.

    NIXL's listener binds it when the model is loaded, a minute later. If another process had the port by then, the
    engine hung during its start: the listener is a thread, and its death goes unnoticed. The socket is bound, but does
    not listen.
    """
    found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, _, _, address = found[0]
    for last in [*[False] * (_PORT_TRIES_MAX - 1), True]:
        with contextlib.ExitStack() as stack:
            held: list[socket.socket] = []
            try:
                for number in range(count):
                    held.append(stack.enter_context(socket.socket(family, kind)))
                    held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    port = held[0].getsockname()[1] + number if number else 0
                    held[-1].bind((address[0], port, *address[2:]))
            except (OSError, OverflowError):
                if last or not held[1:]:
                    raise
                continue
            # ZeroMQ binds no name that has an IPv6 address alone, so it is given the number.
            yield held[0].getsockname()[:2]
            return


def event_addresses(config: EngineConfig) -> EventAddresses | None:
    """Unix sockets in vLLM's folder for them.

    None: it publishes none, or to a listener of the operator's.
    """
    if "kv_events_config" in config.args or config.args.get("enable_prefix_caching") is False:
        return None
    from vllm.utils.network_utils import get_open_zmq_ipc_path

    return EventAddresses(f"{get_open_zmq_ipc_path()}-inproc", f"{get_open_zmq_ipc_path()}-inproc")


def engine_args(
    config: EngineConfig,
    *,
    engine_id: str,
    side_channel: SideChannelAddress,
    events: EventAddresses | None = None,
    tiers: Sequence[Tier] = (),
    objection: str = "",
) -> AsyncEngineArgs:
    """VLLM's arguments for one engine. Raises ValueError naming a setting that vLLM does not know or take.

    ``objection``: a file, as ``with_tiers`` wants it.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from engine.vllm.parsed_args import parsed
    from engine.vllm.values import kv_identity

    values = engine_arg_values(config, engine_id=engine_id, side_channel=side_channel, on_cpu=current_platform.is_cpu())
    if events is not None:
        values["kv_events_config"] = kv_events_values(events)
    values["kv_transfer_config"] = with_tiers(
        values["kv_transfer_config"], tiers, model=kv_identity(config) if tiers else "", objection=objection
    )
    given = {name: value for name, value in config.args.items() if name != "kv_transfer_config"}
    return AsyncEngineArgs(**values | parsed(given))


def engine_arg_values(
    config: EngineConfig, *, engine_id: str, side_channel: SideChannelAddress, on_cpu: bool
) -> dict[str, Any]:
    """The arguments as a map, ``config.args`` last: they win over everything but what the connector needs."""
    values: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "block_size": config.block_size_tokens,
        "enforce_eager": runs_eagerly(config, on_cpu=on_cpu),
        "tensor_parallel_size": config.tensor_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "enable_expert_parallel": config.enable_expert_parallel,
        "max_num_seqs": config.max_num_seqs,
        # Front proxies give each request a number by its class; equal numbers keep the order of arrival.
        "scheduling_policy": "priority",
        "seed": config.seed,
        "enable_prefix_caching": True,
        # The default hashes pickles, under which equal values may differ; this one a router can recompute.
        "prefix_caching_hash_algo": "sha256_cbor",
        "disable_log_stats": True,
        "enable_log_requests": False,
        "scheduler_cls": "engine.vllm.grammar_backends.scheduler",
        "kv_transfer_config": kv_transfer_values(config, engine_id=engine_id, side_channel=side_channel),
    }
    optional = {
        "served_model_name": config.served_model_name or None,
        "tokenizer": config.tokenizer or None,
        "max_model_len": config.max_model_len,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "kv_cache_memory_bytes": config.kv_cache_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None),
    }
    values |= {name: value for name, value in optional.items() if value is not None}
    if on_cpu and runs_in_one_process(config):
        values["distributed_executor_backend"] = "uni"
    return values | {name: value for name, value in config.args.items() if name != "kv_transfer_config"}


def kv_events_values(events: EventAddresses) -> dict[str, Any]:
    """VLLM's ``kv_events_config``: one reader on this machine, which reads often."""
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": events.batches,
        "replay_endpoint": events.replay,
        "buffer_steps": LIMITS.kv_events_kept_steps,
        "hwm": LIMITS.kv_events_waiting_steps,
    }


def kv_transfer_values(config: EngineConfig, *, engine_id: str, side_channel: SideChannelAddress) -> dict[str, Any]:
    """VLLM's ``kv_transfer_config``: our NIXL connector, able to serve and to pull, recomputing what fails to load.

    ``side_channel``: where other engines ask for its NIXL metadata.
    """
    chosen = config.args.get("kv_transfer_config", {})
    values: dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_connector_module_path": "kv_transfer.nixl.connector",
        "kv_role": "kv_both",
        "engine_id": engine_id,
        "kv_load_failure_policy": "recompute",
    }
    values |= {name: chosen[name] for name in CONNECTOR_SETTINGS if name in chosen}
    values["kv_connector_module_path"] = values["kv_connector_module_path"] or None
    values["kv_connector_extra_config"] = {
        "backends": ["UCX"],
        "num_threads": LIMITS.nixl_threads,
        # vLLM takes whole seconds here; the lease of each request is set with the request.
        "kv_lease_duration": max(6, round(LIMITS.lease_duration_s)),
        "baton_side_channel_host": side_channel.host,
        "baton_side_channel_bind_address": side_channel.bind_address,
        "baton_side_channel_port": side_channel.port,
        "baton_progress_delay_us": LIMITS.nixl_progress_delay_us,
        "baton_check_fraction": config.kv_check_fraction,
        "baton_proof_timeout_s": LIMITS.kv_proof_timeout_s,
        "baton_connect_timeout_s": LIMITS.kv_holder_connect_timeout_s,
        "baton_transport_required": config.transport_required,
        **chosen.get("kv_connector_extra_config", {}),
    }
    return values


def with_tiers(
    transfer: dict[str, Any], tiers: Sequence[Tier], *, model: str = "", objection: str = ""
) -> dict[str, Any]:
    """``kv_transfer_config`` with the tiers beside the connector. A request loads from the first that has KV.

    ``model``: what tells apart models whose KV differs. ``objection``: a file for why the tiers cannot be as asked for.
    """
    if not tiers:
        return transfer
    host, *stores = tiers
    own = {name: transfer[name] for name in ("engine_id", "kv_role", "kv_load_failure_policy")}
    connector = {name: value for name, value in transfer.items() if name not in own} | {"kv_role": own["kv_role"]}
    extra: dict[str, Any] = {
        "spec_name": "HostTierSpec",
        "spec_module_path": "kv_transfer.offload.spec",
        "cpu_bytes_to_use": host.capacity_bytes,
        "blocks_per_chunk": 1,
        # A next turn's prompt has this turn's output in it.
        "offload_prompt_only": False,
        "self_describing_kv_events": True,
    }
    if objection:
        extra["baton_objection"] = objection
    if stores:
        extra |= {"baton_stores": [msgspec.to_builtins(tier) for tier in stores], "baton_model": model}
    tier_connector = {
        "kv_connector": "TierConnector",
        "kv_connector_module_path": "kv_transfer.offload.connector",
        "kv_role": own["kv_role"],
        "kv_connector_extra_config": extra,
    }
    connectors = {"connectors": [connector, tier_connector]}
    return {**own, "kv_connector": "MultiConnector", "kv_connector_extra_config": connectors}
