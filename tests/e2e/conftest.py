"""The clusters of these tests: one at a time, started by the first test that needs it, ended when another is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from launcher.demo import model as demo_model
from launcher.local import procfs
from tests.e2e.cluster import Endpoint, baton_up, left_behind, plain_server, shared_memory, stop

SERVED = "demo"
# vLLM would round these float32 weights to bfloat16, in which logits of random prompts tie exactly (1 token in 100):
# which of two equal ones is "greedy" then depends on what shared the batch. In float32 none are closer than 1e-4.
DTYPE = "float32"
MODEL = demo_model.SHIPPED
# What every fake engine is told.
FAKE = ("--model", str(MODEL), "--set", f"engine.served_model_name={SERVED}", "--set", "engine.kind=fake")
REAL = (
    "--model", str(MODEL), "--prefill", "1", "--decode", "2",
    "--set", f"engine.served_model_name={SERVED}",
    "--set", f"engine.dtype={DTYPE}",
    "--set", "engine.max_model_len=4096",
    "--set", "front_proxy.serving.tool_call_parser=hermes",
)  # fmt: skip
PLAIN = (
    "--served-model-name", SERVED,
    "--dtype", DTYPE,
    "--max-model-len", "4096",
    "--block-size", "32",
    "--enforce-eager",
    "--enable-auto-tool-choice",
    "--tool-call-parser", "hermes",
    "--enable-prompt-tokens-details",
)  # fmt: skip


Server = TypeVar("Server")


class Alive:
    """Servers that run. Those of another group end before one of this group starts."""

    def __init__(self) -> None:
        self._group = ""
        self._servers: dict[str, Any] = {}
        self._ends = contextlib.ExitStack()

    def get(self, group: str, name: str, start: Callable[[], AbstractContextManager[Server]]) -> Server:
        """The server of this name, started if it does not run."""
        if group != self._group:
            self.end()
            self._group = group
        if name not in self._servers:
            self._servers[name] = self._ends.enter_context(start())
        server: Server = self._servers[name]
        return server

    def end(self) -> None:
        """End them all."""
        self._servers.clear()
        self._ends.close()


@pytest.fixture(scope="session")
def alive() -> Iterator[Alive]:
    servers = Alive()
    yield servers
    servers.end()


@contextlib.contextmanager
def _real(state_dir: Path) -> Iterator[Endpoint]:
    """One prefill worker and two decode workers with vLLM. They must leave nothing behind."""
    with baton_up(state_dir, REAL) as endpoint:
        yield endpoint
        pids = [process["pid"] for process in endpoint.status()]
        memory = shared_memory(endpoint.process)
        assert stop(endpoint.process) == 0
        assert not any(map(procfs.facts, pids))
    assert memory, "engines share memory with their processes"
    assert left_behind(memory) == set()


@pytest.fixture(scope="module")
def baton(alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    """The cluster with real engines."""
    return alive.get("real", "baton", lambda: _real(tmp_path_factory.mktemp("baton")))


@pytest.fixture(scope="module")
def plain(alive: Alive, tmp_path_factory: pytest.TempPathFactory, baton: Endpoint) -> str:
    """The address of one plain vLLM server. After the cluster: only one set of engines starts at a time."""
    return alive.get("real", "plain", lambda: plain_server(tmp_path_factory.mktemp("plain"), MODEL, PLAIN))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those that share the real engines next to each other, and last those that kill a worker of them."""
    here = [index for index, item in enumerate(items) if item.path.is_relative_to(Path(__file__).parent)]
    fakes, reals, kills = "abc"

    def place(item: pytest.Item) -> str:
        if "baton" not in getattr(item, "fixturenames", ()):
            return fakes
        return kills if item.path.stem in ("test_flip", "test_grammars", "test_resume") else reals

    for index, item in zip(here, sorted((items[index] for index in here), key=place), strict=True):
        items[index] = item
