"""What a scheduler that stands by says to those who ask it."""

from __future__ import annotations

import grpc
import pytest

from runtime.grpc_errors import serves_instead
from tests.scheduler.test_service import listening


@pytest.mark.parametrize("leader", ["a:1", ""])
async def test_it_refuses_and_says_who_leads_if_it_knows(leader: str) -> None:
    async with listening() as setting:
        setting.shell.stands_by_for = leader
        for peer in (await setting.front(), await setting.worker("d0", ready=False)):
            assert await peer.code() is grpc.StatusCode.UNAVAILABLE
            assert await serves_instead(peer.call) == leader
