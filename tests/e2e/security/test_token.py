"""A cluster of fake engines with a token in place of certificates, on real ports."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator

import grpc
import httpx
import pytest

from launcher.hosted import state_file
from protos.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from runtime.rpc import trust
from runtime.rpc.cluster_token import REFUSAL
from tests.e2e.cluster import Endpoint, baton_up
from tests.e2e.conftest import FAKE, SERVED, Alive

DEADLINE_S = 30.0
QUESTION = {"model": SERVED, "prompt": "hello world", "max_tokens": 20}


@pytest.fixture(scope="module")
def cluster(alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    alive.end()
    folder = tmp_path_factory.mktemp("token")
    file = folder / "token"
    file.write_text(secrets.token_hex())
    file.chmod(0o600)
    with baton_up(folder / "state", [*FAKE, "--set", f"tls.token_file={file}"]) as running:
        yield running
    trust.forget()


def test_requests_and_commands_are_served(cluster: Endpoint) -> None:
    answer = httpx.post(f"{cluster.url}/v1/completions", json=QUESTION, timeout=DEADLINE_S)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 20
    assert {line["state"] for line in cluster.status()} == {"ready"}
    cluster.command("restart", "decode-0")


def test_the_doctor_has_every_pair_of_workers_pull(cluster: Endpoint) -> None:
    rows = json.loads(cluster.command("doctor", "--json"))["rows"]
    pulls = [row for row in rows if row["check"] == "pull"]
    assert [row["of"] for row in pulls] == ["prefill-0 to decode-0"]
    assert all(row["verdict"] == "ok" and row["found"].startswith("fake, ") for row in pulls), pulls
    assert {row["of"] for row in rows if row["check"] == "process"} == {line["id"] for line in cluster.status()}
    cluster.wait_idle()


def test_no_process_of_the_cluster_answers_a_stranger(cluster: Endpoint) -> None:
    record = state_file.read(cluster.state_dir)
    inner = [process.status_address or process.grpc_address for process in record.processes]
    for address in [*inner, record.control_address]:
        with grpc.insecure_channel(address) as connection:
            stub = cluster_pb2_grpc.StatusServiceStub(connection)
            with pytest.raises(grpc.RpcError) as raised:
                stub.GetStatus(cluster_pb2.GetStatusRequest(), timeout=DEADLINE_S)
            assert raised.value.details() == REFUSAL, address
