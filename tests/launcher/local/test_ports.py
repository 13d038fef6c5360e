"""Addresses that stay while processes come and go."""

from __future__ import annotations

import contextlib
import socket

import pytest

from launcher.config import BatonConfig
from launcher.local import ports
from launcher.local.ports import HeldPorts, StartError
from launcher.local.process_plan import plan
from runtime.configuration import load
from runtime.rpc.grpc_server import channel, start_server


def configured(*sets: str) -> BatonConfig:
    return load(BatonConfig, file=None, environ={}, sets=sets).value


CONFIG = configured("front_proxy.port=0", "launcher.front_proxies=2")
WAIT_S = 10.0


def ports_of(held: HeldPorts, process_id: str) -> dict[str, int]:
    return {name: int(port) for name, port in (setting.split("=") for setting in held.settings(process_id))}


def test_every_process_that_is_dialled_again_has_a_port_of_its_own() -> None:
    with contextlib.closing(HeldPorts.take(CONFIG, plan(CONFIG))) as held:
        told = {spec.id: ports_of(held, spec.id) for spec in plan(CONFIG)}
        assert set(told["scheduler"]) == {"scheduler.port"}
        assert set(told["front-proxy-1"]) == {"front_proxy.port", "front_proxy.grpc_port"}
        # A worker takes a new port each time: it registers its address.
        assert told["prefill-0"] == {}
        ports = [port for settings in told.values() for port in settings.values()]
        assert len(set(ports)) == len(ports) == 5
        assert held.http_fd("scheduler") is None


def test_a_fixed_port_of_the_scheduler_counts_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, asked = ports._bound, []

    def any_port(host: str, port: int, setting: str, flag: str | None) -> socket.socket:
        asked.append((setting, port))
        return bound(host, 0, setting, flag)

    monkeypatch.setattr(ports, "_bound", any_port)
    config = configured("scheduler.port=7001", "launcher.schedulers=2")
    with contextlib.closing(HeldPorts.take(config, plan(config))) as held:
        assert asked[:2] == [("scheduler.port", 7001), ("scheduler.port", 7002)]
        told = [ports_of(held, f"scheduler-{index}")["scheduler.port"] for index in (0, 1)]
        assert told[0] != told[1]


def test_a_port_that_is_taken_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = configured(f"front_proxy.port={port}")
        with pytest.raises(StartError, match=rf"cannot listen on 127.0.0.1:{port} \(front_proxy.port\)"):
            HeldPorts.take(config, plan(config))


def test_connections_wait_between_one_listener_and_the_next_and_are_refused_once_none_follows() -> None:
    with contextlib.closing(HeldPorts.take(CONFIG, plan(CONFIG))) as held:
        address = ("127.0.0.1", ports_of(held, "front-proxy-0")["front_proxy.port"])
        fd = held.http_fd("front-proxy-0")
        assert fd is not None
        # As a child that inherits it: another descriptor of the same socket.
        with socket.socket(fileno=socket.dup(fd)) as first:
            first.listen()
        with socket.create_connection(address, WAIT_S) as client:
            with socket.socket(fileno=socket.dup(fd)) as second:
                second.settimeout(WAIT_S)
                accepted, peer = second.accept()
                accepted.close()
            assert peer == client.getsockname()
        held.refuse("front-proxy-0")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, WAIT_S)


async def test_one_grpc_server_after_the_other_listens_on_a_kept_port_and_no_other_process_gets_it() -> None:
    with contextlib.closing(HeldPorts.take(CONFIG, plan(CONFIG))) as held:
        port = ports_of(held, "scheduler")["scheduler.port"]
        for _ in range(2):
            server = await start_server("127.0.0.1", port, lambda _: (), message_bytes_max=1 << 20)
            async with channel(server.address, 1 << 20) as opened:
                await opened.channel_ready()
            await server.stop(0)
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
