"""A cluster of fake engines with certificates everywhere, on real ports."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from front_proxy.grpc_api.client import BatonClient, SamplingOptions
from launcher.hosted import state_file
from runtime.rpc import trust
from tests.e2e.cluster import BATON, Endpoint, baton_up, wait_for
from tests.e2e.conftest import FAKE, SERVED, Alive
from tests.runtime.rpc.made_ca import MadeCa

DEADLINE_S = 30.0
QUESTION = {"model": SERVED, "prompt": "hello world", "max_tokens": 20}


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> MadeCa:
    return MadeCa(tmp_path_factory.mktemp("certificates"))


def sign(ca: MadeCa, *, days: float) -> list[str]:
    """New certificates, in the files of the settings."""
    inner, door = ca.sign("inner", days=days), ca.sign("door", dns="localhost", days=days)
    settings = (
        f"tls.cert_file={inner.cert}", f"tls.key_file={inner.key}", f"tls.ca_file={ca.file}",
        f"front_proxy.tls_cert_file={door.cert}", f"front_proxy.tls_key_file={door.key}",
    )  # fmt: skip
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def cluster(alive: Alive, ca: MadeCa, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    alive.end()
    words = ["--set", "front_proxy.host=localhost", "--front-proxies", "2", *sign(ca, days=5)]
    with baton_up(tmp_path_factory.mktemp("tls") / "state", [*FAKE, *words]) as running:
        yield running
    trust.forget()


def seen(ca: MadeCa) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(ca.file))


def stranger_to_names(ca: MadeCa) -> ssl.SSLContext:
    """Certificates inside the cluster carry its name, and no address."""
    context = seen(ca)
    context.check_hostname = False
    return context


def test_clients_are_served_over_tls_and_not_without(cluster: Endpoint, ca: MadeCa) -> None:
    assert cluster.url.startswith("https://localhost:")
    answer = httpx.post(f"{cluster.url}/v1/completions", json=QUESTION, verify=seen(ca), timeout=DEADLINE_S)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 20
    with pytest.raises(httpx.HTTPError):
        httpx.get(cluster.url.replace("https", "http") + "/health", timeout=DEADLINE_S)


async def test_the_python_client_speaks_tls(cluster: Endpoint, ca: MadeCa) -> None:
    async with BatonClient(cluster.grpc_address, tls=ca.file) as client, asyncio.timeout(DEADLINE_S):
        assert await client.models() == [SERVED]
        outputs = [output async for output in client.generate([1, 2, 3], SamplingOptions(max_tokens=4))]
    assert outputs


def test_commands_speak_as_the_cluster_does(cluster: Endpoint) -> None:
    assert {line["state"] for line in cluster.status()} == {"ready"}
    cluster.command("restart", "decode-0")


async def test_no_process_of_the_cluster_answers_a_stranger(cluster: Endpoint, ca: MadeCa) -> None:
    record = state_file.read(cluster.state_dir)
    trust.forget()
    stranger = grpc.ssl_channel_credentials(ca.file.read_bytes())
    for process in record.processes:
        inner = [process.status_address or process.grpc_address, record.control_address]
        for address in inner:
            options = [("grpc.ssl_target_name_override", "baton")]
            async with grpc.aio.secure_channel(address, stranger, options=options) as connection:
                check = health_pb2_grpc.HealthStub(connection).Check
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE, address
        async with httpx.AsyncClient(verify=stranger_to_names(ca)) as client:
            shown = await client.get(f"https://{process.metrics_address}/metrics", timeout=DEADLINE_S)
            assert shown.status_code == 403, process.id
            # A kubelet has no certificate.
            probe = await client.get(f"https://{process.metrics_address}/readyz", timeout=DEADLINE_S)
            assert probe.status_code == 200, process.id


def certificate(cluster: Endpoint, ca: MadeCa) -> bytes | None:
    host, _, port = cluster.url.removeprefix("https://").rpartition(":")
    plain = socket.create_connection((host, int(port)), DEADLINE_S)
    with plain, seen(ca).wrap_socket(plain, server_hostname=host) as connection:
        return connection.getpeercert(binary_form=True)


def test_new_certificates_are_used_under_load_and_nothing_is_lost(cluster: Endpoint, ca: MadeCa) -> None:
    former = certificate(cluster, ca)
    sign(ca, days=60)
    with httpx.Client(verify=seen(ca), timeout=DEADLINE_S) as client:

        def answered_and_new() -> bool:
            assert client.post(f"{cluster.url}/v1/completions", json=QUESTION).status_code == 200
            return certificate(cluster, ca) != former

        wait_for(answered_and_new, timeout_s=DEADLINE_S, what="new connections see the new certificate")
    # Streams between processes are new with it: a restarted worker registers.
    cluster.command("restart", "prefill-0")
    assert {line["state"] for line in cluster.status()} == {"ready"}


def test_a_bad_certificate_is_a_sentence_before_anything_starts(tmp_path: Path, ca: MadeCa) -> None:
    other = MadeCa(tmp_path / "other")
    files = other.sign()
    words = [
        "--set",
        f"tls.cert_file={files.cert}",
        "--set",
        f"tls.key_file={files.key}",
        "--set",
        f"tls.ca_file={ca.file}",
    ]
    command = [*BATON, "up", *FAKE, *words, "--state-dir", str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1, done
    assert "was signed by another CA than that of the CA file" in done.stderr and "Traceback" not in done.stderr
