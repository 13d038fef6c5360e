"""What gRPC is told through the environment, in processes of their own: it reads it once."""

from __future__ import annotations

import os
import subprocess
import sys

import runtime
from launcher.local.environment import child_environment

_OPEN_A_CHANNEL = """
import runtime, os, grpc
print(os.environ["GRPC_EXPERIMENTS"])
channel = grpc.insecure_channel("127.0.0.1:1")
try:
    grpc.channel_ready_future(channel).result(0.01)
except grpc.FutureTimeoutError:
    pass
"""


def _run(**environ: str) -> tuple[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in runtime.GRPC_ENVIRONMENT}
    result = subprocess.run(
        [sys.executable, "-c", _OPEN_A_CHANNEL],
        env=kept | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout.strip(), result.stderr


def test_the_pinned_grpc_knows_what_is_switched_off() -> None:
    told, errors = _run()
    assert told == runtime.GRPC_ENVIRONMENT["GRPC_EXPERIMENTS"]
    assert "Unknown experiment" not in errors
    assert "Unknown experiment: no_such" in _run(GRPC_EXPERIMENTS="no_such")[1], "the test would see it"


def test_an_operator_may_say_otherwise() -> None:
    assert _run(GRPC_EXPERIMENTS="event_engine_fork")[0] == "event_engine_fork"
    assert child_environment({"GRPC_EXPERIMENTS": "event_engine_fork"})["GRPC_EXPERIMENTS"] == "event_engine_fork"
    assert child_environment({})["GRPC_EXPERIMENTS"] == runtime.GRPC_ENVIRONMENT["GRPC_EXPERIMENTS"]
