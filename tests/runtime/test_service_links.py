"""What Kubernetes sets for Services, and what only looks like it."""

from __future__ import annotations

import pytest

from runtime.service_links import found_in, is_service_link

# Of a Service named baton-worker with a port named grpc, as a pod of its namespace sees it.
LINKS = {
    "BATON_WORKER_SERVICE_HOST": "10.0.0.2",
    "BATON_WORKER_SERVICE_PORT": "9000",
    "BATON_WORKER_SERVICE_PORT_GRPC": "9000",
    "BATON_WORKER_PORT": "tcp://10.0.0.2:9000",
    "BATON_WORKER_PORT_9000_TCP": "tcp://10.0.0.2:9000",
    "BATON_WORKER_PORT_9000_TCP_PROTO": "tcp",
    "BATON_WORKER_PORT_9000_TCP_PORT": "9000",
    "BATON_WORKER_PORT_9000_TCP_ADDR": "10.0.0.2",
}


def test_every_variable_of_a_service_is_known() -> None:
    ipv6 = {
        "BATON_PORT": "udp://[fd00::2]:53",
        "BATON_PORT_53_UDP_ADDR": "fd00::2",
        "BATON_A__B_PORT": "tcp://10.0.0.2:1",
    }
    all_links = LINKS | ipv6
    assert found_in(all_links | {"BATON_ENGINE__SEED": "1", "HOME": "/"}, ("BATON_",)) == sorted(all_links)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BATON_WORKER_PORT", "9000"),
        ("BATON_WORKER_PORT", "tcp://worker:9000"),
        ("BATON_WORKER_PORT", "http://10.0.0.2:9000"),
        ("BATON_WORKER__PORT", "tcp://10.0.0.2:9000"),
        ("BATON_WORKER__SERVICE_HOST", "10.0.0.2"),
        ("BATON_WORKER_SERVICE_HOST", "worker"),
        ("BATON_WORKER_HOST", "10.0.0.2"),
        ("BATON_WORKER_METRICS_PORT", "9100"),
    ],
)
def test_a_misspelt_setting_is_none(name: str, value: str) -> None:
    assert not is_service_link(name, value)
