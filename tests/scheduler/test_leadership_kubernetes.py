"""The leader's lease in a Lease of Kubernetes, over real connections: what only an API server does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from runtime.clock import SystemClock
from runtime.configuration import BadConfiguration
from scheduler.config import KubernetesConfig
from scheduler.kubernetes_api import HttpsApi, in_cluster, namespace_of
from scheduler.leadership import Holder
from scheduler.leadership_kubernetes import EPOCH, KubernetesLease
from tests.scheduler.api_server import HOST, ApiServer, Trouble, make_certificate
from tests.scheduler.lease_store import NAMESPACE
from tests.scheduler.seats import LEASE_S, Clock

# Real time, and only of those calls that shall not come to their end.
CALL_TIMEOUT_S = 1.0
ANSWER_BYTES_MAX = 4096


class Setting:
    """An API server, and contenders with one time for a Lease there."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.clock = Clock()
        self.apis: list[HttpsApi] = []

    def seat(self, *, namespace: str = NAMESPACE, call_timeout_s: float = 30.0) -> KubernetesLease:
        config = KubernetesConfig(
            api_host=HOST,
            api_port=self.server.port,
            account_dir=str(self.server.account_dir),
            call_timeout_s=call_timeout_s,
            answer_bytes_max=ANSWER_BYTES_MAX,
        )
        self.apis.append(in_cluster(config, {}))
        return KubernetesLease(self.apis[-1], namespace=namespace, name="lead", lease_s=LEASE_S, clock=self.clock)

    @property
    def lease(self) -> dict[str, Any]:
        return self.server.store.leases["lead"]


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    async with ApiServer(tmp_path).listening() as server:
        setting = Setting(server)
        server.store.put_free("lead")
        yield setting
        for api in setting.apis:
            api.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_lease_says_who_leads_as_kubernetes_tools_expect_it(setting: Setting, *, chunked: bool) -> None:
    setting.server.chunked = chunked
    one, two = setting.seat(), setting.seat()
    first = await one.try_acquire("10.0.0.1:7000")
    assert await one.renew()
    spec = setting.lease["spec"]
    assert spec["holderIdentity"].startswith("10.0.0.1:7000_")
    assert (spec["leaseDurationSeconds"], spec["leaseTransitions"]) == (3, 1)
    assert spec["renewTime"] > spec["acquireTime"]
    assert setting.lease["metadata"]["annotations"] == {EPOCH: str(first)}
    assert await two.try_acquire("10.0.0.2:7000") is None and two.leader == Holder(first or 0, "10.0.0.1:7000")
    await one.release()
    assert setting.lease["spec"]["holderIdentity"] == ""
    assert await two.try_acquire("10.0.0.2:7000") is not None
    assert setting.lease["spec"]["leaseTransitions"] == 2
    assert setting.server.connections == 2, "one for each, kept"


async def test_a_leader_that_is_gone_is_replaced_once_its_time_is_over(setting: Setting) -> None:
    one, two = setting.seat(), setting.seat()
    assert await one.try_acquire("a:1") is not None and await two.try_acquire("b:1") is None
    setting.clock.now_s += LEASE_S
    assert await two.try_acquire("b:1") is not None
    await one.release()
    assert await two.renew(), "a late release takes nothing from the next one"


async def test_a_leader_that_says_it_holds_for_longer_is_waited_for(setting: Setting) -> None:
    one, two = setting.seat(), setting.seat()
    assert await one.try_acquire("a:1") is not None
    setting.lease["spec"]["leaseDurationSeconds"] = 10
    assert await two.try_acquire("b:1") is None
    setting.clock.now_s += 9.0
    assert await two.try_acquire("b:1") is None
    setting.clock.now_s += 1.0
    assert await two.try_acquire("b:1") is not None


@pytest.mark.parametrize("trouble", ["hangs", "hangs_when_done", "cut", "cut_when_done", "error", "stalls_in_body"])
async def test_after_a_renewal_whose_answer_was_lost_the_next_one_counts(setting: Setting, trouble: Trouble) -> None:
    one = setting.seat(call_timeout_s=CALL_TIMEOUT_S)
    assert await one.try_acquire("a:1") is not None
    until_s = one.until_s
    setting.clock.now_s += 1.0
    # A connection that ends without a word was perhaps an idle one, so that is tried once more.
    setting.server.troubles += [trouble, trouble]
    with pytest.raises(OSError, match=r"no answer within 1 s|connection ended|500 Internal"):
        await one.renew()
    assert one.until_s == until_s, "nobody knows whether it was written"
    setting.server.troubles.clear()
    setting.clock.now_s += 1.0
    assert await one.renew() and one.until_s == setting.clock.now_s + LEASE_S


async def test_nothing_else_waits_while_a_renewal_hangs_and_who_waits_may_give_up(setting: Setting) -> None:
    one = setting.seat()
    assert await one.try_acquire("a:1") is not None
    setting.server.troubles.append("hangs_when_done")
    renewing = asyncio.create_task(one.renew())
    await asyncio.wait_for(setting.server.hanging.wait(), 30)
    assert not renewing.done()
    renewing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await renewing
    assert await one.renew()
    await one.release()
    assert setting.lease["spec"]["holderIdentity"] == ""


async def test_a_claim_that_was_not_heard_of_is_anybodys(setting: Setting) -> None:
    one, two = setting.seat(), setting.seat()
    setting.server.troubles.append("cut")
    with pytest.raises(ConnectionError):
        await one.try_acquire("a:1")
    assert await two.try_acquire("b:1") is not None


@pytest.mark.parametrize("trouble", ["hangs_when_done", "cut_when_done"])
async def test_a_claim_whose_answer_was_lost_makes_no_leader_and_is_made_again(
    setting: Setting, trouble: Trouble
) -> None:
    one, two = setting.seat(call_timeout_s=CALL_TIMEOUT_S), setting.seat()
    store = setting.server.store
    # A look that goes well, and behind it the claim.
    store.on_step = lambda step: setting.server.troubles.append(trouble) if step == "look" else None
    with suppress(TimeoutError):
        assert await one.try_acquire("a:1") is None
    store.on_step = lambda _step: None
    lost = int(setting.lease["metadata"]["annotations"][EPOCH])
    assert one.until_s < setting.clock.now_s
    assert await two.try_acquire("b:1") is None, "for whoever looks, it may lead"
    epoch = await one.try_acquire("a:1")
    assert epoch is not None and epoch > lost


async def test_a_connection_that_the_server_closed_meanwhile_is_opened_again_at_once(setting: Setting) -> None:
    one = setting.seat()
    assert await one.try_acquire("a:1") is not None
    setting.server.drop_connections()
    assert await one.renew() and setting.server.connections == 2


async def test_a_token_that_was_replaced_is_read_again(setting: Setting) -> None:
    one = setting.seat()
    assert await one.try_acquire("a:1") is not None
    setting.server.rotate_token("second", told=False)
    with pytest.raises(PermissionError, match="401 Unauthorized: Unauthorized"):
        await one.renew()
    setting.server.rotate_token("second")
    assert await one.renew()
    (setting.server.account_dir / "token").write_text("a word\r\nHost: elsewhere")
    with pytest.raises(PermissionError, match="holds no token"):
        await one.renew()


async def test_a_server_that_nobody_vouches_for_is_told_no_token(setting: Setting) -> None:
    make_certificate(setting.server.account_dir)
    with pytest.raises(OSError, match="certificate verify failed"):
        await setting.seat().try_acquire("a:1")
    assert setting.server.asked == []


@pytest.mark.parametrize("trouble", ["nonsense", "huge"])
async def test_an_answer_that_is_no_lease_is_an_error_and_makes_no_leader(setting: Setting, trouble: Trouble) -> None:
    one = setting.seat()
    setting.server.troubles.append("error")
    with pytest.raises(OSError, match="500 Internal Server Error: etcdserver: leader changed"):
        await one.try_acquire("a:1")
    await setting.seat().try_acquire("b:1")
    setting.server.troubles.append(trouble)
    with pytest.raises(ConnectionError):
        await one.try_acquire("a:1")
    assert one.until_s < setting.clock.now_s


async def test_a_change_by_somebody_else_is_no_takeover_and_stays(setting: Setting) -> None:
    one = setting.seat()
    assert await one.try_acquire("a:1") is not None
    setting.lease["metadata"]["labels"] = {"team": "serving"}
    setting.lease["metadata"]["resourceVersion"] = "4711"
    assert await one.renew()
    assert setting.lease["metadata"]["labels"] == {"team": "serving"}
    setting.lease["spec"]["holderIdentity"] = "somebody else"
    setting.lease["metadata"]["resourceVersion"] = "4712"
    assert not await one.renew()
    two = setting.seat()
    assert await two.try_acquire("b:1") is None and two.leader.address == "", "no name of ours"


async def test_a_lease_that_was_deleted_is_lost_and_the_next_epoch_is_larger(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = setting.seat(), setting.seat()
    first = await one.try_acquire("a:1")
    assert first is not None and await two.try_acquire("b:1") is None
    setting.server.store.leases.clear()
    assert not await one.renew()
    await one.release()
    for _ in range(2):
        assert await two.try_acquire("b:1") is None, "it makes one that nobody holds, and looks at it"
    assert setting.lease["spec"] == {"leaseDurationSeconds": LEASE_S}
    setting.clock.now_s += LEASE_S
    # On another machine, whose clock is behind.
    monkeypatch.setattr("scheduler.leadership_kubernetes.time.time_ns", lambda: 10**18)
    second = await two.try_acquire("b:1")
    assert second == first + 1 and setting.lease["spec"]["leaseTransitions"] == 0


async def test_a_lease_that_is_deleted_and_made_again_below_a_claim_refuses_it(setting: Setting) -> None:
    """A claim that follows nothing would be good wherever there is nothing, and whoever led a moment ago."""
    one, two, store = setting.seat(), setting.seat(), setting.server.store
    store.leases.clear()
    for _ in range(2):
        assert await one.try_acquire("a:1") is None and await two.try_acquire("b:1") is None
    setting.clock.now_s += LEASE_S

    def deleted(step: str) -> None:
        if step == "claim":
            store.on_step = lambda _step: None
            store.leases.clear()

    store.on_step = deleted
    assert await one.try_acquire("a:1") is None and await two.try_acquire("b:1") is None
    assert "holderIdentity" not in setting.lease["spec"]


async def test_where_the_longest_lease_was_deleted_all_wait_for_as_long_as_that(setting: Setting) -> None:
    one, two, late = setting.seat(), setting.seat(), setting.seat()
    assert await one.try_acquire("a:1") is not None
    setting.lease["spec"]["leaseDurationSeconds"] = 10
    assert await two.try_acquire("b:1") is None
    setting.server.store.leases.clear()
    assert await two.try_acquire("b:1") is None and await late.try_acquire("c:1") is None
    setting.clock.now_s += 9.0
    assert await late.try_acquire("c:1") is None
    setting.clock.now_s += 1.0
    assert await late.try_acquire("c:1") is not None


async def test_a_namespace_that_is_not_there_is_named(setting: Setting) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such namespace: .*elsewhere"):
        await setting.seat(namespace="elsewhere").try_acquire("a:1")


def test_outside_a_pod_it_says_what_is_missing(tmp_path: Path) -> None:
    config = KubernetesConfig(account_dir=str(tmp_path))
    with pytest.raises(BadConfiguration, match=r"scheduler\.leader_store: .*KUBERNETES_SERVICE_HOST"):
        in_cluster(config, {})
    with pytest.raises(BadConfiguration, match=r"scheduler\.kubernetes\.namespace: "):
        namespace_of(config)
    (tmp_path / "namespace").write_text("serving\n")
    assert namespace_of(config) == "serving"
    assert namespace_of(KubernetesConfig(namespace="mine")) == "mine"
    assert in_cluster(config, {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}) is not None


def test_the_loop_that_processes_run_on_fails_no_other_way(tmp_path: Path) -> None:
    async def story() -> None:
        async with ApiServer(tmp_path).listening() as server:
            setting = Setting(server)
            server.store.put_free("lead")
            one = setting.seat(call_timeout_s=CALL_TIMEOUT_S)
            assert await one.try_acquire("a:1") is not None
            troubles: list[Trouble] = ["hangs", "hangs_when_done", "cut", "cut_when_done", "error", "stalls_in_body"]
            for trouble in troubles:
                server.troubles += [trouble, trouble]
                with pytest.raises(OSError, match=r"no answer within|connection ended|500 Internal"):
                    await one.renew()
                server.troubles.clear()
                assert await one.renew(), trouble
            server.drop_connections()
            assert await one.renew()
            await one.release()
            make_certificate(tmp_path)
            with pytest.raises(OSError, match="certificate verify failed"):
                await one.try_acquire("a:1")

    uvloop.run(story())


def test_it_runs_by_the_clock_of_the_machine(tmp_path: Path) -> None:
    async def story() -> None:
        async with ApiServer(tmp_path).listening() as server:
            server.store.put_free("lead")
            api = in_cluster(KubernetesConfig(api_host=HOST, api_port=server.port, account_dir=str(tmp_path)), {})
            lease = KubernetesLease(api, namespace=NAMESPACE, name="lead", lease_s=LEASE_S, clock=SystemClock())
            assert await lease.try_acquire("a:1") is not None
            assert await lease.renew()
            await lease.release()

    uvloop.run(story())
