"""A cluster without prefill workers: decode workers compute the prompts too, as one plain engine does."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import baton_up, stop
from tests.e2e.conftest import SERVED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_decode_workers_alone_serve(tmp_path: Path, model_dir: Path) -> None:
    arguments = [
        "--model", str(model_dir), "--prefill", "0", "--decode", "1",
        "--set", "engine.kind=fake", "--set", f"engine.served_model_name={SERVED}",
    ]  # fmt: skip
    with baton_up(tmp_path, arguments) as cluster:
        assert [line["role"] for line in cluster.status()] == ["scheduler", "decode", "front_proxy"]
        for tokens in (1, 5):
            body = {"model": SERVED, "prompt": [20] * 200, "max_tokens": tokens, "ignore_eos": True}
            answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == tokens
        assert stop(cluster.process) == 0
