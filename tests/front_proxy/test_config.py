"""What a configuration of a front proxy must not be."""

from __future__ import annotations

import pytest

from front_proxy.config import FrontProxyConfig
from front_proxy.planning.events import PlanNeeded, SendQuestion
from tests.front_proxy.plan_client_play import EMPTY, QUESTION, Play


@pytest.mark.parametrize(
    "config", [FrontProxyConfig(), FrontProxyConfig(requests_in_flight_max=8, send_messages_max=17)]
)
def test_all_that_are_in_flight_can_ask_a_scheduler_that_comes_back(config: FrontProxyConfig) -> None:
    it = Play()
    for plan_id in range(1, config.requests_in_flight_max + 1):
        it.plan_client.handle(PlanNeeded(plan_id, QUESTION), it.now_s)
    messages = it.open(EMPTY) + it.wait(0.0)
    assert sum(isinstance(message, SendQuestion) for message in messages) == config.requests_in_flight_max
    assert len(messages) <= config.send_messages_max


@pytest.mark.parametrize("most", [{"send_messages_max": 2048}, {"requests_in_flight_max": 4096}])
def test_more_in_flight_than_a_stream_takes_is_refused_and_names_both(most: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"send_messages_max .* requests_in_flight_max"):
        FrontProxyConfig(**most)  # type: ignore[arg-type]
