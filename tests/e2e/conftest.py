"""One real cluster (1 prefill + 1 decode) and one plain vLLM server for all tests here: three engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.demo import model as demo_model
from tests.e2e.cluster import Endpoint, baton_up, is_alive, left_behind, plain_server, shared_memory, stop

SERVED = "demo"
# vLLM would round these float32 weights to bfloat16, in which logits of random prompts tie exactly (1 token in 100):
# which of two equal ones is "greedy" then depends on what shared the batch. In float32 none are closer than 1e-4.
DTYPE = "float32"


@pytest.fixture(scope="package")
def model_dir() -> Path:
    return demo_model.ensure()


@pytest.fixture(scope="package")
def baton(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Endpoint]:
    state_dir = tmp_path_factory.mktemp("baton")
    arguments = [
        "--model", str(model_dir),
        "--set", f"engine.served_model_name={SERVED}",
        "--set", f"engine.dtype={DTYPE}",
        "--set", "engine.max_model_len=4096",
        "--set", "front_proxy.serving.tool_call_parser=hermes",
    ]  # fmt: skip
    with baton_up(state_dir, arguments) as endpoint:
        yield endpoint
        pids = [process["pid"] for process in endpoint.status()]
        memory = shared_memory(endpoint.process)
        assert stop(endpoint.process) == 0
        assert not any(is_alive(pid) for pid in pids)
    assert memory, "engines share memory with their processes"
    assert left_behind(memory) == set()


@pytest.fixture(scope="package")
def plain(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, baton: Endpoint) -> Iterator[str]:
    """Started after the cluster, so that only one set of engines starts at a time on two cores."""
    arguments = [
        "--served-model-name", SERVED,
        "--dtype", DTYPE,
        "--max-model-len", "4096",
        "--block-size", "32",
        "--enforce-eager",
        "--enable-auto-tool-choice",
        "--tool-call-parser", "hermes",
        "--enable-prompt-tokens-details",
    ]  # fmt: skip
    with plain_server(tmp_path_factory.mktemp("plain"), model_dir, arguments) as url:
        yield url
