"""Settings become vLLM's arguments and environment, and what vLLM does not know is named. Starts no engine."""

from __future__ import annotations

import functools
import socket
from typing import Any, Literal

import msgspec
import pytest
from vllm.distributed.kv_events import ZmqEventPublisher

from engine.config import LIMITS, EngineConfig
from engine.protocol import EngineDead
from engine.vllm import args
from engine.vllm.args import (
    SideChannelAddress,
    engine_arg_values,
    engine_args,
    event_addresses,
    held_ports,
    load_model_class,
    prepare_environment,
    runs_eagerly,
    runs_in_one_process,
    with_tiers,
)
from engine.vllm.engine import VllmEngine
from kv_transfer.tiers.config import Tier, parse
from launcher.demo import model as demo_model
from prefill_worker.config import PrefillWorkerConfig
from prefill_worker.role import PrefillRole
from worker.config import WorkerConfig
from worker.run import serve

SIDE_CHANNEL = SideChannelAddress("h", "::1", 5)


def test_the_ports_of_several_ranks_are_free_ones_in_a_row() -> None:
    with held_ports("127.0.0.1", 3) as (address, port):
        for number in range(3):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((address, port + number))


def test_a_port_that_is_held_is_free_for_one_listener_and_for_no_other_process() -> None:
    with held_ports("localhost") as (address, port), socket.socket() as listener:
        assert address == "127.0.0.1"
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass


async def test_an_engine_binds_the_host_of_its_machine_and_tells_others_the_advertised_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: dict[str, Any] = {}

    async def start_at(_: EngineConfig, **given: Any) -> None:
        started.update(given)
        raise EngineDead("enough is known")

    monkeypatch.setattr(VllmEngine, "_start_at", start_at)
    monkeypatch.setattr(args, "prepare_environment", lambda _: None)
    config = EngineConfig(model="m")
    host = WorkerConfig(worker_id="p0", host="localhost", advertise_host="nat.invalid")
    make = functools.partial(PrefillRole, PrefillWorkerConfig())
    with pytest.raises(SystemExit):
        await serve("prefill", {"prefill": make}, config, host, started.update)
    assert started["side_channel"][:2] == ("nat.invalid", "127.0.0.1")
    with pytest.raises(ValueError, match=r"worker\.host: NIXL cannot listen at nat\.invalid: "):
        await VllmEngine.start(config, worker_id="p0", role="prefill", host="nat.invalid", advertise_host="")


def test_what_the_operator_set_stays() -> None:
    environ = {"UCX_TLS": "rc"}
    prepare_environment(EngineConfig(enforce_eager=True), environ)
    assert environ["UCX_TLS"] == "rc"
    assert environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environ["TORCH_COMPILE_DISABLE"] == "1"


@pytest.mark.parametrize(
    ("required", "set_before", "tls"),
    [("", None, LIMITS.ucx_tls), ("rdma", None, "^tcp"), ("rdma", "tcp,rc", "rc")],
)
def test_where_rdma_is_required_ucx_may_not_take_tcp(
    required: Literal["", "rdma"], set_before: str | None, tls: str
) -> None:
    environ = {"VLLM_TARGET_DEVICE": "cpu"} | ({"UCX_TLS": set_before} if set_before else {})
    prepare_environment(EngineConfig(transport_required=required), environ)
    assert environ["UCX_TLS"] == tls


def test_on_gpus_ucx_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "runs_on_cpu", lambda _: False)
    environ: dict[str, str] = {}
    prepare_environment(EngineConfig(), environ)
    assert "UCX_TLS" not in environ


async def test_without_an_rdma_device_a_worker_that_needs_one_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.vllm.engine.rdma_devices", list)
    config = EngineConfig(model="m", transport_required="rdma")
    with pytest.raises(ValueError, match=r"engine\.transport_required: this machine has no RDMA device"):
        await VllmEngine.start(config, worker_id="p0", role="prefill", host="localhost", advertise_host="")


@pytest.mark.parametrize(
    ("config", "on_cpu", "eager", "executor"),
    [
        (EngineConfig(), True, True, "uni"),
        (EngineConfig(), False, False, None),
        (EngineConfig(enforce_eager=False), True, False, "uni"),
        (EngineConfig(enforce_eager=True), False, True, None),
        (EngineConfig(args={"compilation_config": {"mode": 1}}), True, False, "uni"),
        (EngineConfig(tensor_parallel_size=2), True, True, None),
        (EngineConfig(args={"distributed_executor_backend": "mp"}), True, True, "mp"),
    ],
)
def test_where_the_model_is_compiled_and_which_process_runs_it(
    config: EngineConfig, on_cpu: bool, eager: bool, executor: str | None
) -> None:
    values = engine_arg_values(config, engine_id="p0-1", side_channel=SIDE_CHANNEL, on_cpu=on_cpu)
    assert (values["enforce_eager"], values.get("distributed_executor_backend")) == (eager, executor)
    environ = {"VLLM_TARGET_DEVICE": "cpu"}
    prepare_environment(config, environ)
    assert ("TORCH_COMPILE_DISABLE" in environ) is runs_eagerly(config, on_cpu=True)
    # vLLM is told to accept a model in the engine core only where that is asked for.
    assert ("VLLM_ENABLE_V1_MULTIPROCESSING" in environ) is runs_in_one_process(config)


def test_the_models_class_is_loaded_here_and_not_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import ModelRegistry

    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    load_model_class(str(demo_model.SHIPPED))
    assert ModelRegistry.models["LlamaForCausalLM"].inspect_model_cls().supports_pp
    load_model_class("some/name")


def test_further_arguments_win_and_name_the_connector_but_not_what_baton_needs_of_it() -> None:
    values = engine_arg_values(EngineConfig(model="m"), engine_id="p0-1", side_channel=SIDE_CHANNEL, on_cpu=True)
    assert values["kv_cache_memory_bytes"] == 1 << 30
    assert values["scheduling_policy"] == "priority"
    transfer = values["kv_transfer_config"]
    assert (transfer["kv_connector"], transfer["kv_connector_module_path"]) == (
        "NixlConnector", "kv_transfer.nixl.connector",
    )  # fmt: skip
    chosen = {
        "kv_connector": "MultiConnector",
        "kv_connector_module_path": "",
        "kv_connector_extra_config": {"backends": ["LIBFABRIC"]},
        "engine_id": "mine",
    }
    config = EngineConfig(model="m", args={"max_num_seqs": 3, "kv_transfer_config": chosen})
    values = engine_arg_values(config, engine_id="p0-1", side_channel=SIDE_CHANNEL, on_cpu=True)
    assert values["max_num_seqs"] == 3
    transfer = values["kv_transfer_config"]
    assert (transfer["kv_connector"], transfer["kv_connector_module_path"]) == ("MultiConnector", None)
    assert (transfer["engine_id"], transfer["kv_role"]) == ("p0-1", "kv_both")
    assert transfer["kv_load_failure_policy"] == "recompute"
    extra = transfer["kv_connector_extra_config"]
    assert extra["backends"] == ["LIBFABRIC"]
    assert [extra[f"baton_side_channel_{name}"] for name in ("host", "bind_address", "port")] == ["h", "::1", 5]


def test_an_engine_publishes_its_blocks_unless_the_operator_says_otherwise() -> None:
    addresses = event_addresses(EngineConfig())
    assert addresses is not None and addresses.batches != addresses.replay
    made = engine_args(EngineConfig(model="m"), engine_id="e", side_channel=SIDE_CHANNEL, events=addresses)
    assert made.kv_events_config["enable_kv_cache_events"]
    assert made.kv_events_config["endpoint"] == addresses.batches
    own: list[dict[str, Any]] = [
        {"kv_events_config": {"enable_kv_cache_events": True}},
        {"enable_prefix_caching": False},
    ]
    assert [event_addresses(EngineConfig(args=args)) for args in own] == [None] * 2


def test_each_rank_publishes_its_blocks_where_vllm_puts_them() -> None:
    addresses = event_addresses(EngineConfig(data_parallel_size=3))
    assert addresses is not None
    for rank in range(3):
        at = addresses.of_rank(rank)
        offset = ZmqEventPublisher.offset_endpoint_port
        assert (at.batches, at.replay) == (offset(addresses.batches, rank), offset(addresses.replay, rank))
        assert len(at.replay) < 107, "a Unix socket has no longer name"


def test_a_host_tier_stands_beside_the_connector_and_changes_nothing_of_it() -> None:
    values = engine_arg_values(EngineConfig(model="m"), engine_id="p0-1", side_channel=SIDE_CHANNEL, on_cpu=True)
    alone = values["kv_transfer_config"]
    assert with_tiers(alone, ()) == alone
    both = with_tiers(alone, parse(("host:2GiB",)))
    assert {name: both[name] for name in ("kv_connector", "engine_id", "kv_role", "kv_load_failure_policy")} == {
        "kv_connector": "MultiConnector", "engine_id": "p0-1", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }  # fmt: skip
    nixl, tier = both["kv_connector_extra_config"]["connectors"]
    assert nixl == {name: alone[name] for name in alone if name not in ("engine_id", "kv_load_failure_policy")}
    assert tier["kv_connector_extra_config"]["cpu_bytes_to_use"] == 2 << 30
    assert "baton_stores" not in tier["kv_connector_extra_config"]


def test_the_stores_behind_a_host_tier_are_told_in_their_order_and_of_which_model_they_are() -> None:
    values = engine_arg_values(EngineConfig(model="m"), engine_id="p0-1", side_channel=SIDE_CHANNEL, on_cpu=True)
    tiers = parse(("host:2GiB", "file:/mnt/kv:1GiB,shared=true", "s3://bucket/kv:1TiB,endpoint=http://s3"))
    both = with_tiers(values["kv_transfer_config"], tiers, model="weights")
    extra = both["kv_connector_extra_config"]["connectors"][1]["kv_connector_extra_config"]
    assert extra["baton_model"] == "weights"
    assert msgspec.convert(extra["baton_stores"], list[Tier]) == list(tiers[1:])
