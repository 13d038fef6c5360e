"""The model, and what one plain engine says to every prompt."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from launcher.demo import model as demo_model
from tests.e2e.cluster import plain_server
from tests.e2e.conftest import DTYPE, Alive
from tests.e2e.experts import moe_model
from tests.e2e.experts.live import SERVED, complete, prompts


@pytest.fixture(scope="package")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_model.make(demo_model.SHIPPED, tmp_path_factory.mktemp("moe") / "model")


@pytest.fixture(scope="package")
def expected(moe: Path, alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one plain engine without parallel ranks says."""
    words = ("--served-model-name", SERVED, "--dtype", DTYPE, "--max-model-len", "1024", "--block-size", "32")
    alive.end()
    folder = tmp_path_factory.mktemp("plain")
    with plain_server(folder, moe, [*words, "--enforce-eager"]) as url, httpx.Client(base_url=url, timeout=120) as it:
        return [complete(it, prompt) for prompt in prompts()]
