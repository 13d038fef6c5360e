"""Addresses that stay while processes come and go."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Iterator, Sequence

import pytest

from launcher.backend import StartError
from launcher.config import BatonConfig
from launcher.hosted.process_plan import plan
from launcher.local import ports
from launcher.local.ports import HTTP_FD_VARIABLE, STATUS_PORT_VARIABLE, HeldPorts
from runtime.configuration import load
from runtime.rpc.grpc_server import channel, start_server


def configured(*sets: str) -> BatonConfig:
    return load(BatonConfig, file=None, environ={}, sets=sets).value


CONFIG = configured("front_proxy.port=0", "launcher.front_proxies=2")
WAIT_S = 10.0
CONNECTIONS = 1000


def ports_of(held: HeldPorts, process_id: str) -> dict[str, int]:
    return {name: int(port) for name, port in (setting.split("=") for setting in held.settings(process_id))}


def test_every_process_that_is_dialled_again_has_a_port_of_its_own() -> None:
    with contextlib.closing(HeldPorts.take(CONFIG, plan(CONFIG))) as held:
        told = {spec.id: ports_of(held, spec.id) for spec in plan(CONFIG)}
        assert set(told["scheduler"]) == {"scheduler.port"}
        # A worker takes a new port each time: it registers its address.
        assert told["prefill-0"] == {}
        first, second = told["front-proxy-0"], told["front-proxy-1"]
        same = {name for name in first if first[name] == second[name]}
        assert same == {"front_proxy.port", "front_proxy.grpc_port"}
        assert set(first) - same == set(second) - same == {"front_proxy.metrics_port"}
        statuses = {held.variables(name)[STATUS_PORT_VARIABLE] for name in ("front-proxy-0", "front-proxy-1")}
        ports = {str(port) for settings in told.values() for port in settings.values()}
        assert (len(ports), len(ports | statuses)) == (5, 7)
        assert held.http_fd("scheduler") is None
        assert held.variables("scheduler") == {}


def test_a_front_proxy_alone_shares_nothing_and_has_its_metrics_and_its_status_on_its_ports() -> None:
    config = configured("front_proxy.port=0")
    with contextlib.closing(HeldPorts.take(config, plan(config))) as held:
        assert set(ports_of(held, "front-proxy-0")) == {"front_proxy.port", "front_proxy.grpc_port"}
        assert set(held.variables("front-proxy-0")) == {HTTP_FD_VARIABLE}
        with socket.socket(fileno=socket.dup(int(held.variables("front-proxy-0")[HTTP_FD_VARIABLE]))) as http:
            assert http.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0


def test_a_set_metrics_port_is_left_to_the_plan() -> None:
    config = configured("front_proxy.port=0", "front_proxy.metrics_port=9200", "launcher.front_proxies=2")
    with contextlib.closing(HeldPorts.take(config, plan(config))) as held:
        assert "front_proxy.metrics_port" not in ports_of(held, "front-proxy-1")


def test_a_fixed_port_of_the_scheduler_counts_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, asked = ports._bound, []

    def any_port(host: str, port: int, setting: str, flag: str) -> socket.socket:
        asked.append((setting, port))
        return bound(host, 0, setting, flag)

    monkeypatch.setattr(ports, "_bound", any_port)
    config = configured("scheduler.port=7001", "launcher.schedulers=2")
    with contextlib.closing(HeldPorts.take(config, plan(config))) as held:
        assert asked[:2] == [("scheduler.port", 7001), ("scheduler.port", 7002)]
        told = [ports_of(held, f"scheduler-{index}")["scheduler.port"] for index in (0, 1)]
        assert told[0] != told[1]


@pytest.mark.parametrize("front_proxies", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["front_proxy.port", "front_proxy.grpc_port"])
def test_a_port_that_is_taken_is_told_before_anything_starts(name: str, shared: bool, front_proxies: int) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = configured("front_proxy.port=0", f"{name}={port}", f"launcher.front_proxies={front_proxies}")
        with pytest.raises(StartError, match=rf"cannot listen on 127.0.0.1:{port} \({name}\)"):
            HeldPorts.take(config, plan(config))


@pytest.mark.parametrize("name", ["front_proxy.port", "front_proxy.grpc_port"])
def test_two_clusters_that_start_at_the_same_time_do_not_share_a_port(name: str) -> None:
    with contextlib.closing(HeldPorts.take(CONFIG, plan(CONFIG))) as held:
        # Nothing listens there yet.
        port = ports_of(held, "front-proxy-0")[name]
        again = configured("front_proxy.port=0", f"{name}={port}", "launcher.front_proxies=3")
        with pytest.raises(StartError, match=rf"127.0.0.1:{port} \({name}\): another `baton up` has it"):
            HeldPorts.take(again, plan(again))
    with contextlib.closing(HeldPorts.take(again, plan(again))):
        pass


@contextlib.contextmanager
def inherited(held: HeldPorts, process_id: str) -> Iterator[socket.socket]:
    """As a child that inherits the socket and listens: another descriptor of the same socket."""
    fd = held.http_fd(process_id)
    assert fd is not None
    with socket.socket(fileno=socket.dup(fd)) as listener:
        listener.listen(CONNECTIONS)
        listener.setblocking(False)
        yield listener


def accepted(listener: socket.socket) -> int:
    """How many connections waited there."""
    for count in itertools.count():
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
    raise AssertionError


def test_new_connections_are_spread_over_the_front_proxies_that_serve() -> None:
    config = configured("front_proxy.port=0", "launcher.front_proxies=4")
    ids = [f"front-proxy-{index}" for index in range(4)]
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(contextlib.closing(HeldPorts.take(config, plan(config))))
        address = ("127.0.0.1", ports_of(held, ids[0])["front_proxy.port"])

        def counts(listeners: Sequence[socket.socket]) -> list[int]:
            with contextlib.ExitStack() as clients:
                for _ in range(CONNECTIONS):
                    clients.enter_context(socket.create_connection(address, WAIT_S))
                return [accepted(listener) for listener in listeners]

        with contextlib.ExitStack() as processes:
            assert all(
                0.75 <= 4 * count / CONNECTIONS <= 1.25
                for count in counts([processes.enter_context(inherited(held, name)) for name in ids])
            )
        # All have ended, and nothing is refused. One will not come back: the others get what is new.
        with contextlib.ExitStack() as clients:
            for _ in range(100):
                clients.enter_context(socket.create_connection(address, WAIT_S))
        held.refuse(ids[2])
        with contextlib.ExitStack() as processes:
            others = [processes.enter_context(inherited(held, name)) for name in ids if name != ids[2]]
            assert 0 < sum(accepted(listener) for listener in others) < 100, "one had its share of them"
            assert sum(counts(others)) == CONNECTIONS
            held.admit(ids[2])
            with inherited(held, ids[2]) as again:
                assert 0.75 <= 4 * counts([again, *others])[0] / CONNECTIONS <= 1.25


def test_connections_wait_between_one_listener_and_the_next_and_are_refused_once_none_follows() -> None:
    with contextlib.closing(HeldPorts.take(CONFIG, plan(CONFIG))) as held:
        address = ("127.0.0.1", ports_of(held, "front-proxy-0")["front_proxy.port"])
        with inherited(held, "front-proxy-0"):
            pass
        with socket.create_connection(address, WAIT_S) as client, inherited(held, "front-proxy-0") as second:
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


async def test_the_grpc_servers_of_several_front_proxies_listen_on_one_kept_port() -> None:
    with contextlib.closing(HeldPorts.take(CONFIG, plan(CONFIG))) as held:
        port = ports_of(held, "front-proxy-0")["front_proxy.grpc_port"]
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                server = await start_server("127.0.0.1", port, lambda _: (), message_bytes_max=1 << 20, shared=True)
                stack.push_async_callback(server.stop, 0)
            # None meets the socket that keeps the port: it does not listen.
            for _ in range(20):
                opened = await stack.enter_async_context(channel(f"127.0.0.1:{port}", 1 << 20))
                await asyncio.wait_for(opened.channel_ready(), WAIT_S)
