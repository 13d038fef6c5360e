"""Both ways write the same of the deltas that real engines gave (tests/golden/deltas.jsonl)."""

from __future__ import annotations

import pytest

from tests.front_proxy.conftest import Served
from tests.front_proxy.openai_api.delta_script import both, same
from tests.front_proxy.openai_api.recording import read

REQUESTS_MIN = 300


@pytest.mark.parametrize("stream", [True, False])
async def test_the_bytes_of_recorded_requests_are_those_of_vllms_app(demo: Served, stream: bool) -> None:
    requests = read()
    for each in requests:
        body = {"model": "demo", "stream": stream, **each.body}
        if not stream:
            body.pop("stream_options", None)
        same(*await both(demo, each.path, body, each.steps), body)
    assert len(requests) >= REQUESTS_MIN
