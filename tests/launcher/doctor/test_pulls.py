"""Test pulls between workers with fake engines over real ports; what a pull says becomes a row."""

from __future__ import annotations

import pytest

from engine.config import FakeEngineConfig
from launcher.doctor import pulls
from launcher.doctor.cluster import pair_row, version_row
from launcher.doctor.pulls import BYTES_MAX, Pull, pull
from launcher.hosted.status import StatusLine
from runtime.rpc.protocol import PROTOCOL
from tests.support.in_process_worker import StartWorker, start_worker

__all__ = ["start_worker"]


async def test_a_pull_is_measured_and_leaves_nothing(start_worker: StartWorker) -> None:
    prefill, decode = await start_worker("prefill"), await start_worker("decode")
    found = await pull(prefill.core.address, decode.core.address)
    assert found.problem == "" and found.transports == ("fake",)
    assert 0 < found.kv_bytes <= BYTES_MAX and found.seconds > 0
    await prefill.settled()
    await decode.settled()
    # Once more: no cache has what the first one left.
    again = await pull(prefill.core.address, decode.core.address)
    assert again.kv_bytes == found.kv_bytes


async def test_a_pull_that_fails_says_so(start_worker: StartWorker) -> None:
    prefill = await start_worker("prefill")
    decode = await start_worker("decode", fake=FakeEngineConfig(pull_failure_every=1))
    found = await pull(prefill.core.address, decode.core.address)
    assert found.problem == "the KV was computed again: the decode worker's log says why"
    await prefill.settled()


async def test_a_worker_that_refuses_is_quoted(start_worker: StartWorker) -> None:
    prefill, decode = await start_worker("prefill"), await start_worker("decode")
    found = await pull(decode.core.address, decode.core.address)
    assert found.problem.startswith("no KV was offered: decode worker")
    await prefill.settled()


async def test_a_worker_that_is_gone_is_a_problem_within_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls, "TIMEOUT_S", 0.5)
    found = await pull("127.0.0.1:1", "127.0.0.1:1")
    assert "answer" in found.problem


@pytest.mark.parametrize(
    ("transports", "required", "verdict"),
    [
        (("cma",), "", "ok"),
        (("rc_mlx5",), "rdma", "ok"),
        (("tcp",), "", "warn"),
        (("rc_mlx5", "tcp"), "rdma", "fail"),
        (("unknown",), "", "warn"),
    ],
)
def test_what_a_transport_means(transports: tuple[str, ...], required: str, verdict: str) -> None:
    row = pair_row("p to d", Pull(transports=transports, kv_bytes=2_000_000, seconds=0.001), required=required)
    assert row.verdict == verdict and (row.do == "") == (verdict == "ok")
    assert row.found == f"{' or '.join(transports)}, 2.00 GB/s, 2.0 MB"


@pytest.mark.parametrize(("protocols", "verdict"), [((PROTOCOL, PROTOCOL), "ok"), ((PROTOCOL, 0), "warn")])
def test_processes_of_two_versions_are_a_warning(protocols: tuple[int, ...], verdict: str) -> None:
    lines = [StatusLine(id=f"d{n}", role="decode", state="ready", protocol=told) for n, told in enumerate(protocols)]
    silent = StatusLine(id="d9", role="decode", state="unreachable")
    row = version_row([*lines, silent])
    assert row.verdict == verdict and ("protocol 1: 1 processes" in row.found) == (verdict == "warn")
