"""Logs: one line per event whatever it holds, ours and libraries' in one form."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from runtime.process.logs import LineFormatter

PROGRAM = """
import logging, structlog
from runtime.process.logs import configure_logging
configure_logging("info", "p-1")
log = structlog.get_logger("demo")
log.debug("below the level")
log.info("lease expired", lease="a-1", held_s=1.23456789, note='say "hi" now', empty="", many=["x\\ny"])
try:
    raise ValueError("first\\nsecond")
except ValueError:
    log.exception("it\\nbroke")
    logging.getLogger("library").warning("took %d s", 3, exc_info=True)
"""


def test_an_event_is_one_line_with_its_level_process_logger_and_fields() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    expired, broke, library = (line.partition(" ")[2] for line in done.stderr.splitlines())
    assert (
        expired == 'info p-1 demo lease expired lease=a-1 held_s=1.23457 note="say \\"hi\\" now" empty="" '
        """many=['x\\ny']"""
    )
    assert broke.startswith('error p-1 demo it\\nbroke exception="Traceback')
    assert broke.count("Traceback") == 1 and "ValueError: first\\nsecond" in broke
    assert library.startswith('warning p-1 library took 3 s exception="Traceback')


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
