"""The port of operators: what probes and Prometheus get, with and without a certificate."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtime.process import telemetry
from runtime.process.telemetry import Health, serve_metrics
from runtime.rpc import trust
from runtime.tls import TlsConfig
from tests.runtime.rpc.made_ca import MadeCa

DEADLINE_S = 10.0


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    trust.forget()
    yield
    trust.forget()


async def get(url: str, verify: ssl.SSLContext | bool = True) -> tuple[int, str]:
    async with httpx.AsyncClient(verify=verify, timeout=DEADLINE_S) as client:
        answer = await client.get(url)
        return answer.status_code, answer.text.strip()


async def test_probes_say_in_a_line_why_it_is_not_well() -> None:
    health = Health()
    url = f"http://{serve_metrics('127.0.0.1', 0, health)}"
    assert await get(f"{url}/livez") == (200, "ok")
    assert await get(f"{url}/readyz") == (503, "it starts")
    health.not_ready = str
    assert await get(f"{url}/readyz?verbose") == (200, "ok")
    health.not_alive = lambda: "engine died"
    assert await get(f"{url}/livez") == (503, "engine died")
    assert await get(f"{url}/healthz") == (404, "here are /metrics, /livez and /readyz")
    assert (await get(f"{url}/metrics"))[1].startswith("# HELP")


async def test_a_process_whose_event_loop_stands_still_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "LOOP_ANSWER_TIMEOUT_S", 0.2)
    url = f"http://{serve_metrics('127.0.0.1', 0, Health())}/livez"
    found: list[httpx.Response] = []
    asked = threading.Thread(target=lambda: found.append(httpx.get(url, timeout=DEADLINE_S)))
    asked.start()
    asked.join()  # the loop waits, and answers nothing
    assert (found[0].status_code, found[0].text) == (503, "the event loop has not answered for 0.2 s\n")


async def test_with_certificates_metrics_are_shown_to_the_cluster_and_probes_to_all(tmp_path: Path) -> None:
    ca = MadeCa(tmp_path)
    files = ca.sign("process")
    trust.use(TlsConfig(cert_file=str(files.cert), key_file=str(files.key), ca_file=str(ca.file)))
    held = trust.cluster()
    assert held is not None
    address = serve_metrics("127.0.0.1", 0, Health())
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))):  # says nothing, and holds up no other
        known = await get(f"https://{address}/metrics", held.client_context())
        assert known[0] == 200 and "baton_certificate_expires_timestamp_seconds" in known[1]
        kubelet = ssl.create_default_context()
        kubelet.check_hostname, kubelet.verify_mode = False, ssl.CERT_NONE
        assert await get(f"https://{address}/livez", kubelet) == (200, "ok")
        assert await get(f"https://{address}/metrics", kubelet) == (403, "show a certificate of the cluster")
        stranger = MadeCa(tmp_path / "other").sign("stranger")
        kubelet.load_cert_chain(stranger.cert, stranger.key)
        # Where it is told depends on when the alert comes.
        with pytest.raises((httpx.HTTPError, ssl.SSLError)):
            await get(f"https://{address}/livez", kubelet)
        with pytest.raises(httpx.HTTPError):
            await get(f"http://{address}/livez")
