"""Relays pass everything on, and cut, delay or hold exactly the connections of one process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from chaos.network import routes_to
from chaos.relay import HOST, Disturbance, Relays, port_of
from launcher.backend import ProcessSpec
from launcher.config import BatonConfig, LauncherConfig
from launcher.hosted.process_plan import plan

WAIT_S = 20.0
NO_PID = 0


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()
    writer.close()


class Wires:
    """Two echoing processes, a and b, behind relays."""

    def __init__(self, relays: Relays, ports: dict[str, int]) -> None:
        self.relays = relays
        self.ports = ports
        self._open: list[asyncio.StreamWriter] = []

    async def connect(self, target: str) -> Wire:
        reader, writer = await asyncio.open_connection(HOST, self.ports[target])
        self._open.append(writer)
        return Wire(reader, writer)

    def close(self) -> None:
        for writer in self._open:
            writer.transport.abort()


class Wire:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def say(self, text: bytes) -> None:
        self._writer.write(text)
        await self._writer.drain()

    async def hear(self, count: int) -> bytes:
        return await asyncio.wait_for(self._reader.readexactly(count), WAIT_S)

    async def echoed(self, text: bytes) -> bytes:
        await self.say(text)
        return await self.hear(len(text))

    async def end(self) -> bytes:
        self._writer.write_eof()
        return await asyncio.wait_for(self._reader.read(), WAIT_S)


@asynccontextmanager
async def wires() -> AsyncIterator[Wires]:
    specs = [ProcessSpec(id="a", role="prefill"), ProcessSpec(id="b", role="decode")]
    routes, _ = routes_to([ProcessSpec(id="scheduler", role="scheduler"), *specs])
    servers = [await asyncio.start_server(echo, HOST, port_of(route.kept)) for route in routes]
    relays = Relays(routes)
    await relays.start()
    made = Wires(relays, {route.process_id: port_of(route.listener) for route in routes})
    try:
        yield made
    finally:
        made.close()
        await relays.close()
        for server in servers:
            server.close()


async def test_what_nothing_happens_to_arrives_whole_and_ends_when_its_side_ends() -> None:
    async with wires() as made:
        wire = await made.connect("a")
        text = os.urandom(1_000_000)
        told = asyncio.create_task(wire.say(text))
        assert await wire.hear(len(text)) == text
        await told
        assert await wire.end() == b""


async def test_a_cut_resets_what_is_open_and_what_is_new_and_spares_the_others() -> None:
    async with wires() as made:
        hit, spared = await made.connect("a"), await made.connect("b")
        assert await hit.echoed(b"1") + await spared.echoed(b"2") == b"12"
        async with made.relays.disturbed("a", NO_PID, Disturbance(cut=True)):
            with pytest.raises(ConnectionResetError):
                await hit.hear(1)
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await (await made.connect("a")).echoed(b"3")
            assert await spared.echoed(b"4") == b"4"
        assert await (await made.connect("a")).echoed(b"5") == b"5"
        assert made.relays.disturbed_connections == 2


async def test_a_black_hole_keeps_connections_open_and_gives_back_what_it_swallowed() -> None:
    async with wires() as made:
        old, other = await made.connect("a"), await made.connect("b")
        assert await old.echoed(b"1") == b"1"
        async with made.relays.disturbed("a", NO_PID, Disturbance(blackhole=True)):
            new = await made.connect("a")
            await old.say(b"2")
            await new.say(b"3")
            answers = [asyncio.create_task(wire.hear(1)) for wire in (old, new)]
            for _ in range(50):
                assert await other.echoed(b"4") == b"4"
            assert not any(answer.done() for answer in answers)
        assert await asyncio.gather(*answers) == [b"2", b"3"]


async def test_a_delay_is_at_least_as_long_each_way_and_keeps_the_order() -> None:
    loop = asyncio.get_running_loop()
    async with wires() as made:
        wire = await made.connect("a")
        assert await wire.echoed(b"0") == b"0"
        async with made.relays.disturbed("a", NO_PID, Disturbance(delay_s=0.1)):
            began_s = loop.time()
            for text in (b"1", b"2", b"3"):
                await wire.say(text)
            assert await wire.hear(3) == b"123"
            assert loop.time() - began_s >= 0.2


async def test_a_process_is_hit_in_the_connections_that_it_opened_wherever_they_lead() -> None:
    async with wires() as made:
        mine = await made.connect("a")
        assert await mine.echoed(b"1") == b"1"
        port = made.ports["b"]
        script = (
            "import socket, sys\n"
            f"wire = socket.create_connection(('{HOST}', {port}))\n"
            "wire.sendall(b'x'); wire.recv(1); print('open', flush=True)\n"
            "try:\n    print('closed' if wire.recv(1) == b'' else 'data', flush=True)\n"
            "except ConnectionResetError:\n    print('reset', flush=True)\n"
        )
        child: Any = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
        assert await asyncio.wait_for(child.stdout.readline(), WAIT_S) == b"open\n"
        async with made.relays.disturbed("front-proxy-0", child.pid, Disturbance(cut=True)):
            assert await asyncio.wait_for(child.stdout.readline(), WAIT_S) == b"reset\n"
            assert await mine.echoed(b"2") == b"2"
        async with made.relays.disturbed("front-proxy-0", os.getpid(), Disturbance(cut=True)):
            with pytest.raises(ConnectionResetError):
                await mine.hear(1)
        await child.wait()


def test_every_process_that_others_connect_to_gets_ports_in_a_row_and_is_reached_through_its_relay() -> None:
    specs = plan(BatonConfig(launcher=LauncherConfig(prefill=2, decode=2, front_proxies=2)))
    routes, said = routes_to(specs)
    settings = {name: int(port) for name, port in (setting.split("=") for setting in said)}
    assert set(settings) == {"scheduler.port", "scheduler.advertise_port", "worker.port", "worker.advertise_port"}
    relayed = {route.process_id: (port_of(route.listener), port_of(route.kept)) for route in routes}
    workers = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    for section, names in (("scheduler", ("scheduler",)), ("worker", workers)):
        for offset, name in enumerate(names):
            advertised, own = settings[f"{section}.advertise_port"], settings[f"{section}.port"]
            assert relayed[name] == (advertised + offset, own + offset)
    assert set(relayed) == {"scheduler", *workers}
    for route in routes:
        route.listener.close()
        route.kept.close()
