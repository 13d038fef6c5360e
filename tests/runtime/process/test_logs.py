"""Logs: one line per event whatever it holds, ours and libraries' in one form."""

from __future__ import annotations

import logging
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from accounts import keys
from runtime.failures import Failure, FailureError, FailureKind
from runtime.process.logs import ContentFaults, LineFormatter

PROGRAM = """
import logging, structlog
from runtime.process.logs import configure_logging
configure_logging("info", "p-1")
log = structlog.get_logger("demo")
log.debug("below the level")
log.info("lease expired", lease="a-1", held_s=1.23456789, note='say "hi" now', empty="", many=["x\\ny"])
try:
    raise ValueError("first\\n50% of it")
except ValueError:
    log.exception("it\\nbroke")
    logging.getLogger("library").warning("took %d s", 3, exc_info=True)
    logging.getLogger("library").exception("Failed to compile grammar for request %s", "r")
"""


def test_of_a_key_the_id_alone_is_written() -> None:
    shown = keys.mint(secrets.choice)
    record = logging.LogRecord("demo", logging.INFO, "", 0, "no model %r", (shown,), None)
    line = LineFormatter().format(record)
    assert f"bt-{keys.id_of(shown)}..." in line and shown[13:] not in line


def test_an_event_is_one_line_with_its_level_process_logger_and_fields() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    expired, broke, library, grammar = (line.partition(" ")[2] for line in done.stderr.splitlines())
    assert (
        expired == 'info p-1 demo lease expired lease=a-1 held_s=1.23457 note="say \\"hi\\" now" empty="" '
        """many=['x\\ny']"""
    )
    assert broke.startswith('error p-1 demo it\\nbroke exception="Traceback')
    assert broke.count("Traceback") == 1 and "ValueError: first\\n50% of it" in broke
    assert library.startswith('warning p-1 library took 3 s exception="Traceback')
    assert grammar == "error p-1 library Failed to compile grammar for request r: first\\n50% of it"


def test_where_nothing_is_configured_the_standard_library_decides(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "demo"):
        structlog.get_logger("demo").info("not this")
        structlog.get_logger("demo").warning("but this", why="level")
    assert caplog.messages == ["but this why=level"]


def test_vllm_is_told_to_log_in_the_same_form() -> None:
    import json
    import logging.config

    told = json.loads((Path(__file__).parents[3] / "engine" / "vllm" / "logging.json").read_text())
    told["loggers"] = {f"test_{name}": rest for name, rest in told["loggers"].items()}
    logging.config.dictConfig(told)
    (handler,) = logging.getLogger("test_vllm").handlers
    assert isinstance(handler.formatter, LineFormatter)
    assert [type(each) for each in handler.filters] == [ContentFaults]


# As `x-api-key` may hold it; gRPC's own client would not send it.
ODD_KEY = """
import asyncio, struct
from runtime.process.logs import configure_logging
from runtime.rpc.grpc_server import start_server
configure_logging("info", "p-1")

def frame(kind, flags, payload, stream=1):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

def header(name, value):
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value

async def main():
    server = await start_server("127.0.0.1", 0, lambda _: [], message_bytes_max=1 << 20)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    names = {b":method": b"POST", b":scheme": b"http", b":path": b"/grpc.health.v1.Health/Check", b":authority": b"x",
             b"content-type": b"application/grpc", b"te": b"trailers", b"x-api-key": b"secret\\xff"}
    headers = b"".join(header(name, value) for name, value in names.items())
    message = frame(4, 0, b"", 0) + frame(1, 4, headers) + frame(0, 1, bytes(5))
    writer.write(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + message)
    answered = b""
    while b"grpc-status\\x010" not in answered:
        answered += await asyncio.wait_for(reader.read(4096), 20)
    writer.close()
    await server.stop(0)

asyncio.run(main())
"""


def test_metadata_that_is_not_text_is_served_and_not_logged() -> None:
    done = subprocess.run([sys.executable, "-c", ODD_KEY], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def record(message: str, error: Exception, *args: object) -> logging.LogRecord:
    return logging.LogRecord("vllm", logging.ERROR, "", 0, message, args, (type(error), error, None))


def test_the_words_of_a_fault_of_a_requests_own_content_are_bounded() -> None:
    long = record("Failed to compile grammar for request %s", ValueError("x" * 10_000), "r-1")
    assert ContentFaults().filter(long)
    assert len(LineFormatter().format(long)) < 1_000


@pytest.mark.parametrize(("kind", "written"), [(FailureKind.BAD_REQUEST, False), (FailureKind.INTERNAL, True)])
def test_where_a_fault_is_passed_on_only_that_of_the_content_is_left_out(kind: FailureKind, written: bool) -> None:
    passed_on = RuntimeError("as the app says it")
    passed_on.__cause__ = FailureError(Failure(kind=kind, message="as the engine said it"))
    assert ContentFaults().filter(record("Error in the stream.", passed_on)) is written
    assert ContentFaults().filter(record("Error in the stream.", RuntimeError("a bug")))
