"""The connector's own bookkeeping. That it moves KV is for the engine contract, with real engines."""

from __future__ import annotations

import queue
import socket
import threading
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engine.vllm.args import held_ports
from kv_transfer.handoff.keys import RENEW
from kv_transfer.integrity.held_kv_registry import HeldKvRegistry
from kv_transfer.integrity.transfer_verifier import SideChannel, TransferVerifier
from tests.support.golden import GOLDEN, Options, check_script

messages = pytest.importorskip("kv_transfer.nixl.messages")
scheduler_half = pytest.importorskip("kv_transfer.nixl.scheduler")
worker_half = pytest.importorskip("kv_transfer.nixl.worker")


class FakeNixl:
    """Hands out notifications as a NIXL agent does."""

    def __init__(self) -> None:
        self.inbox: list[bytes] = []

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        messages, self.inbox = self.inbox, []
        return {"d0": messages} if messages else {}


@pytest.fixture
def worker() -> Any:
    """A worker half without an agent: only what a release and a notification touch."""
    half = object.__new__(worker_half.BatonNixlWorker)
    half.__dict__.update(
        nixl_wrapper=FakeNixl(),
        xfer_stats=messages.BatonNixlStats(),
        transfer_topo=SimpleNamespace(),
        _held_blocks={},
        _released=set(),
        _dismissed={},
        _reqs_to_process=set(),
        _reqs_to_send={},
        consumer_notification_counts_by_req=defaultdict(int),
        expected_consumer_notifications_by_req={},
        pcp_rank=0,
        pcp_dcp_sharded=False,
        _ready_requests=queue.Queue(),
        _recving_metadata={},
        _recving_transfers=defaultdict(list),
        _recv_failures=set(),
        _failed_recv_reqs=queue.Queue(),
        _replicated_pcp_done_sending=set(),
        tp_rank=0,
        use_host_buffer=False,
        _has_mamba=False,
        _cleanup_remote_engines=lambda: None,
        _pulled=set(),
        _lost=set(),
        _regions=[],
        _checksums=deque(),
        _connect_timeout_s=2.0,
        _verifier=TransferVerifier(channel=SideChannel(lambda *_: b""), timeout_s=2.0, checksums_of=half._checksums_of),
    )
    return half


def metadata(
    *,
    hold: dict[str, int] | None = None,
    release: set[str] | None = None,
    renew: dict[str, float] | None = None,
    lease_ends_s: float = 1e12,
) -> Any:
    meta = messages.BatonNixlMetadata()
    meta.baton_held = hold or {}
    meta.reqs_in_batch = set(hold or {})
    meta.reqs_to_send = dict.fromkeys(hold or {}, lease_ends_s)
    meta.baton_release = release or set()
    meta.baton_renew = renew or {}
    return meta


def step(half: Any, **kwargs: Any) -> set[str]:
    half.start_load_kv(metadata(**kwargs))
    sent: set[str] = half.get_transfer_results().finished_sending
    return sent


def test_holds_releases_and_notifications_go_as_written(worker: Any) -> None:
    late = worker.xfer_stats.data["num_notifications_after_expiry"]

    def play(_: str, names: list[str], options: Options) -> list[str]:
        hold, release, renew, heard = (
            options[what].split(",") if what in options else [] for what in ("hold", "release", "renew", "heard")
        )
        worker.nixl_wrapper.inbox = [word.encode() for word in heard]
        sent = step(
            worker,
            hold=dict.fromkeys(hold, 1),
            release=set(release),
            renew=dict.fromkeys(renew, 60.0),
            lease_ends_s=0.0 if "over" in names else 1e12,
        )
        told = worker.take_metadata()
        tracked = worker._reqs_to_process | {*worker._reqs_to_send, *worker.consumer_notification_counts_by_req}
        said = {"sent": sent, "lost": told.lost if told else (), "late": map(str, late), "tracked": tracked}
        lines = [f"{what} {' '.join(sorted(each))}" for what, each in said.items()]
        late.clear()
        return [line for line in lines if not line.endswith(" ")]

    check_script(GOLDEN / "nixl_releases.txt", play)


def test_a_renewal_shortens_no_lease(worker: Any) -> None:
    assert step(worker, hold={"long": 4}, renew={"long": 60.0}) == set()
    assert worker._reqs_to_send["long"] == 1e12


def test_what_is_remembered_of_releases_is_bounded(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_half, "_RELEASED_REMEMBERED_MAX", 3)
    for number in range(10):
        step(worker, hold={f"r{number}": 1}, release={f"r{number}"})
    assert list(worker._dismissed) == ["r7", "r8", "r9"]


def test_a_peer_that_does_not_listen_fails_at_once(worker: Any) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        worker._nixl_handshake("127.0.0.1", port, 1, "p0-1")


def test_the_handshake_is_given_the_address_that_answered(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(worker_half.NixlPullConnectorWorker, "_nixl_handshake", lambda _, *given: asked.extend(given))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        worker._nixl_handshake("localhost", port, 1, "p0-1")
    assert asked == ["127.0.0.1", port, 1, "p0-1"]


def test_the_listener_binds_its_own_address_and_not_the_one_that_others_are_told() -> None:
    half = scheduler()
    half._bind_address = "127.0.0.1"
    ready, stop = threading.Event(), threading.Event()
    with held_ports("127.0.0.1") as (_, port):
        listener = threading.Thread(
            target=half._nixl_handshake_listener, args=({}, ready, stop, "nat.invalid", port), daemon=True
        )
        listener.start()
        assert ready.wait(10)
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        stop.set()
        listener.join(10)
    assert not listener.is_alive()


def test_a_reader_that_was_faster_than_the_step_that_holds_leaves_nothing_behind(worker: Any) -> None:
    worker._reqs_to_process.add("r")
    worker.nixl_wrapper.inbox = [b"r:1"]
    assert step(worker) == {"r"}
    late = metadata()
    late.baton_held = {"r": 4}
    worker.start_load_kv(late)
    assert not worker._held_blocks
    assert worker.take_metadata() is None


def test_ranks_words_are_put_together() -> None:
    ours = messages.BatonWorkerMetadata({"a": {0: b"0"}}, {"x"})
    both = ours.aggregate(messages.BatonWorkerMetadata({"a": {1: b"1"}, "b": {1: b"2"}}, {"y"}))
    assert both.checksums == {"a": {0: b"0", 1: b"1"}, "b": {1: b"2"}}
    assert both.lost == {"x", "y"}


def scheduler(backoff: int = 0) -> Any:
    half = object.__new__(scheduler_half.BatonNixlScheduler)
    half.__dict__.update(
        _request_by_lease={},
        _lease_by_request={},
        _newly_held={},
        _to_release=set(),
        _to_renew={},
        _lost=set(),
        _to_check={},
        _check_fraction=1.0,
        _registry=HeldKvRegistry("p0-1", "sum"),
        _is_hma_required=False,
        _has_mamba=backoff > 0,
        _bounded_replay=False,
        vllm_config=SimpleNamespace(num_prefill_lookahead_tokens=backoff + 1),
        _layout={},
    )
    return half


@pytest.mark.parametrize(
    ("backoff", "remote", "prompt", "computed", "taken"),
    [
        *[(0, 32, 33, 0, 32), (0, 32, 32, 0, 32), (0, 32, 20, 0, 20), (0, 32, 33, 32, 0), (0, 100, 101, 64, 36)],
        # A state of the whole prompt would have its last tokens in it twice, so the prompt is computed here.
        *[(1, 31, 32, 0, 31), (1, 32, 32, 0, 0), (1, 30, 32, 0, 30), (1, 1, 1, 0, 0), (1, 40, 33, 0, 0)],
    ],
)
def test_exactly_what_was_prefilled_is_taken_over(
    backoff: int, remote: int, prompt: int, computed: int, taken: int
) -> None:
    request = SimpleNamespace(
        kv_transfer_params={"do_remote_prefill": True, "remote_num_tokens": remote}, num_prompt_tokens=prompt
    )
    assert scheduler(backoff).get_num_new_matched_tokens(request, computed) == (taken, taken > 0)


def test_a_renewal_names_leases_and_unknown_ones_are_ignored() -> None:
    half = scheduler()
    half._request_by_lease = {"lease": "lease-1a2b"}
    request = SimpleNamespace(kv_transfer_params={RENEW: {"lease": 30.0, "gone": 30.0}}, request_id="x")
    assert half.request_finished(request, ([1],)) == (False, None)
    assert half._to_renew == {"lease-1a2b": 30.0}


def handshake(**changes: Any) -> Any:
    """One rank's word, as an agent sends it."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import metadata as nixl

    agent = {
        "engine_id": "p0-1", "agent_metadata": b"", "kv_caches_base_addr": [1, 2], "device_id": 0, "num_blocks": 9,
        "block_lens": [64, 64], "block_strides": [64, 64], "kv_cache_layout": "LBHNC", "block_size": 32,
        "ssm_sizes": (0, 0), "attn_backend_name": "CPU_ATTN", "physical_blocks_per_logical_kv_block": 1,
    }  # fmt: skip
    compatibility = changes.pop("compatibility_hash", "h")
    told = msgspec.msgpack.encode(nixl.NixlAgentMetadata(**agent | changes))
    return {(0, 0): nixl.NixlHandshakePayload(compatibility_hash=compatibility, agent_metadata_bytes=told)}


@pytest.mark.parametrize(
    ("changes", "equal"),
    [
        ({"engine_id": "d0-7", "kv_caches_base_addr": [7, 8], "num_blocks": 99, "region_num_blocks": [99, 99]}, True),
        ({"agent_metadata": b"other", "device_id": 3}, True),
        ({"kv_cache_layout": "LBNHC"}, False),
        ({"attn_backend_name": "FLASH_ATTN"}, False),
        ({"block_lens": [64, 32]}, False),
        ({"compatibility_hash": "other speculative settings"}, False),
    ],
)
def test_what_a_handshake_would_refuse_makes_another_layout(changes: dict[str, Any], equal: bool) -> None:
    private = pytest.importorskip("kv_transfer.nixl.private")
    assert (private.layout_facts(handshake(**changes)) == private.layout_facts(handshake())) is equal


class SaidByUcx:
    """UCX's log, read in these parts."""

    def __init__(self, *parts: tuple[set[str], list[str]]) -> None:
        self.parts = list(parts)

    def read(self) -> tuple[set[str], list[str]]:
        return self.parts.pop(0)


def named(worker: Any, *parts: tuple[set[str], list[str]]) -> list[str]:
    """What is reported of first pulls from as many engines."""
    worker.__dict__.update(_ucx_log=SaidByUcx(*parts), _transports=set(), _engines_met=set(), _first_pulls={})
    for number in range(len(parts)):
        worker._first_pulls["r"] = (f"engine-{number}", "host")
        worker._name_transport(f"engine-{number}", "host")
        assert worker._first_pulls == {}
    reported: list[str] = worker.xfer_stats.data[messages.TRANSPORTS]
    return reported


def test_each_transport_is_reported_once(worker: Any) -> None:
    assert named(worker, ({"cma"}, ["a warning"]), (set(), []), ({"tcp", "cma"}, [])) == ["cma", "tcp"]


def test_a_transport_that_ucx_does_not_say_is_unknown(worker: Any) -> None:
    assert named(worker, (set(), []), ({"rc_mlx5"}, [])) == ["unknown", "rc_mlx5"]


def test_a_failed_pull_passes_on_what_ucx_said_and_names_no_transport(
    worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    worker.__dict__.update(
        _ucx_log=SaidByUcx((set(), ["UCX  ERROR  no route"])),
        _first_pulls={"r": ("e", "h")},
        _transport_required="rdma",
    )
    worker._say_pull_failed({"r"})
    said = caplog.text
    assert "no route" in said and "engine.transport_required leaves it no TCP to fall back on" in said
    assert worker._first_pulls == {} and worker.xfer_stats.is_empty()
