"""What a configuration of a front proxy must not be."""

from __future__ import annotations

import msgspec
import pytest

from front_proxy.config import FrontProxyConfig
from front_proxy.planning.events import PlanNeeded, SendQuestion
from tests.support.plan_client import EMPTY, QUESTION, Play


@pytest.mark.parametrize("config", [FrontProxyConfig(), FrontProxyConfig(requests_in_flight_max=1)])
def test_all_that_are_in_flight_can_ask_a_scheduler_that_comes_back(config: FrontProxyConfig) -> None:
    it = Play()
    for plan_id in range(1, config.requests_in_flight_max + 1):
        it.plan_client.handle(PlanNeeded(msgspec.structs.replace(QUESTION, plan_id=plan_id)), it.now_s)
    messages = it.open(EMPTY) + it.wait(0.0)
    assert sum(isinstance(message, SendQuestion) for message in messages) == config.requests_in_flight_max
    assert len(messages) <= config.send_messages_max
