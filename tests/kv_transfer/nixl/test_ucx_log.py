"""By which transport KV is pulled: UCX's own words, and a real pull between two processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kv_transfer.nixl.ucx_log import FILE_VARIABLE, UcxLog, transports_and_rest, without_tcp

TIMEOUT_S = 180.0
STAMP = "[1796086907.592895] [vm:7925 :0]   "
# As the pinned UCX writes it.
SAID = """
+--------+-------------+-----------------------------------+
| taker self cfg#0                                         |
| remote memory write by ucp_put* from host memory to host |
+--------+-------------+-----------------------------------+
| Range  | Description |              Config               |
+--------+-------------+-----------------------------------+
| 0..inf | zero-copy   | cma/memory                        |
+--------+-------------+-----------------------------------+
+-----------+--------------------+-----------------------------------------------+
| taker inter-node cfg#1                                                         |
| remote memory read by ucp_get*(multi) into host memory from host               |
+-----------+--------------------+-----------------------------------------------+
|   Range   |    Description     |                    Config                     |
+-----------+--------------------+-----------------------------------------------+
|  0..8184  | copy-out           | rc_mlx5/mlx5_0:1                              |
| 8185..inf | zero-copy          | 50% on rc_mlx5/mlx5_0:1 and 50% on rc_verbs/x |
+-----------+--------------------+-----------------------------------------------+
+-----------+--------------------+---------------------------------+
| taker self cfg#0                                                 |
| active message by ucp_am_send*(fast-completion) from host memory |
+-----------+--------------------+---------------------------------+
| 8185..inf | multi-frag copy-in | tcp/lo                          |
+-----------+--------------------+---------------------------------+
       select.c:722  UCX  ERROR   no active messages transport
"""


def test_only_tables_of_pulls_name_transports_and_the_rest_is_passed_on() -> None:
    transports, rest = transports_and_rest([STAMP + line for line in SAID.strip("\n").splitlines()])
    assert transports == {"rc_mlx5", "rc_verbs"}
    assert [line.split() for line in rest] == [
        ["select.c:722", "UCX", "ERROR", "no", "active", "messages", "transport"]
    ]


def test_an_operators_own_log_is_left_alone(tmp_path: Path) -> None:
    environ = {FILE_VARIABLE: "mine"}
    log = UcxLog(environ)
    log.opened()
    assert environ == {FILE_VARIABLE: "mine"} and log.read() == (set(), [])


def test_the_file_has_no_name_once_it_is_open() -> None:
    environ: dict[str, str] = {}
    log = UcxLog(environ)
    file = Path(environ[FILE_VARIABLE])
    file.write_text("UCX  WARN  something\n")
    log.opened()
    # A process that this one starts would make it anew.
    assert not file.exists() and environ == {}
    assert log.read() == (set(), ["UCX  WARN  something"]) and log.read() == (set(), [])
    log.close()


@pytest.mark.parametrize(
    ("tls", "left"),
    [
        ("", "^tcp"),
        ("all", "^tcp"),
        ("tcp", "^tcp"),
        ("tcp,rc,cuda_ipc", "rc,cuda_ipc"),
        ("^cma", "^tcp,cma"),
        ("^tcp", "^tcp"),
    ],
)
def test_tcp_is_taken_out_and_nothing_else(tls: str, left: str) -> None:
    assert without_tcp(tls) == left


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed")
def test_a_real_pull_between_two_processes_is_named(tmp_path: Path) -> None:
    # What UCX chooses of more is for the engine contract, with real engines.
    command = [sys.executable, "-m", "tests.kv_transfer.nixl.real_pull", "taker"]
    environ = os.environ | {"UCX_TLS": "tcp,self", "NIXL_LOG_LEVEL": "ERROR", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environ)
    assert done.stdout.split() == ["tcp"], done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
