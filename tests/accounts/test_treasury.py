"""Holds and budgets: A1 to A3 and T1 of docs/accounts.md on the pure machine."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from accounts.config import AccountsLimits
from accounts.key_table import Key
from accounts.rules import Budget, Limits, Price, Rules, Team
from accounts.treasury import Held, HoldAsked, PartTold, Refused, Treasury
from accounts.usage import UsageRecord

SLICE = 8
NONE = Limits()
PRICE = Price(prompt=10, cached=1, output=40, batch_permille=500)
DAY_S = 86_400.0
TEAMS = ("a", "b")
KEYS = {f"k{team}{n}": team for team in TEAMS for n in range(2)}


def rules(limits: Limits = NONE, cluster: Limits = NONE, **team: object) -> Rules:
    return Rules(prices={"demo": PRICE}, cluster=cluster, teams={"a": Team(limits=limits, **team)})  # type: ignore[arg-type]


def key(key_id: str, limits: Limits = NONE) -> Key:
    return Key(key_id=key_id, digest=b"", team=KEYS[key_id], limits=limits)


def treasury(of: Rules, limits: Limits = NONE, *, enforce: bool = True) -> Treasury:
    keys = {name: key(name, limits) for name in KEYS}
    return Treasury(of, keys, slice_tokens=SLICE, enforce=enforce, limits=AccountsLimits())


def ask(number: int, part: int = 0, **facts: object) -> HoldAsked:
    asked = HoldAsked(
        uid=number.to_bytes(16, "big"),
        part=part,
        key_id="ka0",
        team="a",
        model="demo",
        priority_class="default",
        prompt_tokens=10,
        output_tokens_max=20,
    )
    return msgspec.structs.replace(asked, **facts)


def record(asked: HoldAsked, prompt: int = 10, cached: int = 0, output: int = 5) -> UsageRecord:
    return UsageRecord(
        uid=asked.uid,
        key_id=asked.key_id,
        team=asked.team,
        model=asked.model,
        api="/v1/completions",
        priority_class=asked.priority_class,
        outcome="finished",
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=output,
    )


def budget(amount: int) -> Limits:
    return Limits(budgets=(Budget(amount=amount, window="day"),))


def test_many_requests_at_once_do_not_pass_a_budget_together() -> None:
    # A prompt is 100 and a slice 320: nine fit into 4,000.
    one = treasury(rules(budget(4_000)))
    held = [one.hold(ask(n), "front", 0.0, 0.0) for n in range(500)]
    assert held.count(None) == 9
    refused = held[-1]
    assert isinstance(refused, Refused) and refused.reason == "budget"
    assert "Team a has used its budget of 0.000004 EUR (day)" in refused.message
    assert refused.retry_after_s == DAY_S


def test_what_is_settled_gives_the_rest_back_at_once() -> None:
    one = treasury(rules(budget(500)))
    assert one.hold(ask(1), "front", 0.0, 0.0) is None
    assert isinstance(one.hold(ask(2), "front", 0.0, 0.0), Refused)
    settled, ended = one.settle(record(ask(1), cached=10, output=1), 1.0, 1.0)
    assert (settled.amount, ended) == (10 * 1 + 40, True)
    assert one.hold(ask(2), "front", 1.0, 1.0) is None


def test_an_output_grows_slice_by_slice_until_the_budget_ends() -> None:
    one = treasury(rules(budget(100 + 2 * SLICE * 40)))
    asked = ask(1, output_tokens_max=100)
    assert one.hold(asked, "front", 0.0, 0.0) is None and one.granted(asked, 0.0) == Held(SLICE)
    assert one.extend(asked.uid, 0, SLICE, 1.0) == 2 * SLICE
    assert one.extend(asked.uid, 0, SLICE, 1.0) == 2 * SLICE, "told again"
    assert one.extend(asked.uid, 0, 2 * SLICE, 2.0) == 2 * SLICE, "refused"
    assert one.extend(b"unknown", 0, 2 * SLICE, 2.0) is None


def test_what_was_granted_elsewhere_meanwhile_is_held_with_the_next_extension() -> None:
    one = treasury(rules())
    asked = ask(1, output_tokens_max=100)
    one.hold(asked, "front", 0.0, 0.0)
    assert one.extend(asked.uid, 0, 3 * SLICE, 1.0) == 4 * SLICE
    assert one.held == 100 + 4 * SLICE * 40


def test_siblings_hold_their_output_and_an_attempt_holds_nothing_again() -> None:
    one = treasury(rules(budget(100 + 2 * SLICE * 40)))
    assert one.hold(ask(1), "front", 0.0, 0.0) is None
    assert one.hold(ask(1), "front", 0.0, 0.0) is None
    assert one.hold(ask(1, part=1, prompt_tokens=0), "front", 0.0, 0.0) is None
    assert isinstance(one.hold(ask(1, part=2, prompt_tokens=0), "front", 0.0, 0.0), Refused)
    one.check()
    assert one.settle(record(ask(1)), 0.0, 0.0)[1]
    assert (one.held, one.holds) == (0, 0)


@pytest.mark.parametrize(
    ("limits", "reason", "text"),
    [
        (Limits(requests_per_minute=1), "rate", "requests_per_minute, 1"),
        (Limits(prompt_tokens_per_minute=12), "rate", "prompt_tokens_per_minute, 12"),
        (Limits(output_tokens_per_minute=10), "rate", "output_tokens_per_minute, 10"),
        (Limits(concurrent_requests=1), "concurrency", "concurrent_requests, 1"),
        (budget(500), "budget", "budget"),
    ],
)
@pytest.mark.parametrize("scope", ["cluster", "team", "key"])
def test_every_limit_of_every_scope_refuses(scope: str, limits: Limits, reason: str, text: str) -> None:
    one = treasury(
        rules(limits if scope == "team" else NONE, limits if scope == "cluster" else NONE),
        limits if scope == "key" else NONE,
    )
    assert one.hold(ask(1), "front", 0.0, 0.0) is None
    refused = one.hold(ask(2), "front", 0.0, 0.0)
    assert isinstance(refused, Refused) and refused.reason == reason and text in refused.message
    assert refused.message.startswith({"cluster": "The cluster", "team": "Team a", "key": "API key ka0"}[scope])
    assert not refused.may_wait
    counted = treasury(rules(limits), limits, enforce=False)
    assert all(counted.hold(ask(n), "front", 0.0, 0.0) is None for n in range(5))


def test_a_rate_says_exactly_when_it_has_room_again() -> None:
    one = treasury(rules(Limits(requests_per_minute=30)))
    for number in range(30):
        assert one.hold(ask(number), "front", 0.0, 0.0) is None
    refused = one.hold(ask(30), "front", 0.0, 0.0)
    assert isinstance(refused, Refused) and refused.retry_after_s == 2.0
    assert isinstance(one.hold(ask(30), "front", 1.9, 0.0), Refused)
    assert one.hold(ask(30), "front", 2.0, 0.0) is None
    held = one.granted(ask(30), 2.0)
    assert held is not None and held.standing is not None and held.standing.requests is not None
    assert held.standing.requests.remaining == 0 and held.standing.requests.reset_s == 60.0


def test_a_prompt_larger_than_its_rate_runs_when_the_rate_is_full_and_is_owed() -> None:
    one = treasury(rules(Limits(prompt_tokens_per_minute=60)))
    assert one.hold(ask(1, prompt_tokens=90), "front", 0.0, 0.0) is None
    refused = one.hold(ask(2, prompt_tokens=10), "front", 0.0, 0.0)
    assert isinstance(refused, Refused) and refused.retry_after_s == 40.0
    one.settle(record(ask(1), prompt=90, cached=80), 0.0, 0.0)
    assert one.hold(ask(2, prompt_tokens=10), "front", 0.0, 0.0) is None, "cached tokens are given back"


def test_requests_of_batch_may_wait_for_a_rate_but_not_for_a_budget() -> None:
    one = treasury(rules(Limits(requests_per_minute=1)))
    one.hold(ask(1, priority_class="batch"), "front", 0.0, 0.0)
    refused = one.hold(ask(2, priority_class="batch"), "front", 0.0, 0.0)
    assert isinstance(refused, Refused) and refused.may_wait
    one = treasury(rules(budget(1)))
    refused = one.hold(ask(2, priority_class="batch"), "front", 0.0, 0.0)
    assert isinstance(refused, Refused) and not refused.may_wait


def test_a_hold_belongs_to_the_window_in_which_it_began() -> None:
    one = treasury(rules(budget(500)))
    one.hold(ask(1), "front", 0.0, DAY_S - 1)
    assert one.hold(ask(2), "front", 2.0, DAY_S + 1) is None, "a new day"
    assert one.extend(ask(1).uid, 0, SLICE, 2.0) == SLICE, "its own day is used up"
    one.settle(record(ask(1)), 2.0, DAY_S + 1)
    one.settle(record(ask(2), output=0), 2.0, DAY_S + 1)
    assert one.account("team:a", 2.0, DAY_S + 1).spents[0].settled == 100


def test_a_new_leader_holds_nothing_on_a_budget_before_all_have_told_what_runs() -> None:
    one = treasury(rules(budget(1_000)))
    one.expect(["front-1", "front-2"], 0.0)
    refused = one.hold(ask(1), "front-1", 1.0, 1.0)
    assert isinstance(refused, Refused) and refused.reason == "rebuilding" and refused.may_wait
    other = ask(9, key_id="kb0", team="b")
    assert one.hold(other, "front-1", 1.0, 1.0) is None, "nothing bounds it"
    told = PartTold(ask(2, output_tokens_max=100), 2 * SLICE)
    assert one.told("front-1", [told, PartTold(other, SLICE)], 1.0, 1.0) == []
    assert isinstance(one.hold(ask(1), "front-1", 1.0, 1.0), Refused)
    one.told("front-2", [], 1.0, 1.0)
    assert isinstance(one.hold(ask(1), "front-1", 1.0, 1.0), Refused), "740 of 1000 are held"
    assert one.hold(ask(1, prompt_tokens=1, output_tokens_max=1), "front-1", 1.0, 1.0) is None


def test_a_front_proxy_that_does_not_come_back_is_waited_for_only_so_long() -> None:
    one = treasury(rules(budget(1_000)))
    one.expect(["front-1"], 0.0)
    assert isinstance(one.hold(ask(1), "front-2", 4.9, 4.9), Refused)
    assert one.hold(ask(1), "front-2", 5.0, 5.0) is None


def test_holds_of_a_front_proxy_that_went_away_are_settled_as_they_are() -> None:
    one = treasury(rules())
    one.hold(ask(1), "front", 0.0, 0.0)
    one.left("front", 1.0)
    assert one.due(30.9, 30.9) == []
    (estimated,) = one.due(31.0, 31.0)
    assert estimated.estimated and estimated.outcome == "unknown"
    assert (estimated.prompt_tokens, estimated.output_tokens, estimated.amount) == (10, SLICE, 100 + SLICE * 40)
    assert one.due(99.0, 99.0) == []


def test_a_late_truth_replaces_what_was_booked_without_it() -> None:
    one = treasury(rules())
    one.hold(ask(1), "front", 0.0, 0.0)
    one.left("front", 0.0)
    (estimated,) = one.due(30.0, 30.0)
    told, ended = one.settle(record(ask(1)), 31.0, 31.0)
    assert not ended
    account = one.account("team:a", 31.0, 31.0)
    assert (account.spents[0].settled, account.spents[0].late) == (estimated.amount, 0)
    one.booked(told.uid, estimated.amount)
    one.booked(told.uid, told.amount - estimated.amount)
    assert (account.spents[0].settled, account.spents[0].late) == (told.amount, 0)
    one.check()


def test_without_its_ledger_nothing_that_has_a_price_begins() -> None:
    one = treasury(rules())
    one.ledger_away = True
    refused = one.hold(ask(1), "front", 0.0, 0.0)
    assert isinstance(refused, Refused) and refused.reason == "ledger"
    assert one.hold(ask(1, model="free"), "front", 0.0, 0.0) is None


class Books(RuleBasedStateMachine):
    """Front proxies ask, extend, settle, leave and return in any order; budgets hold at every moment."""

    @initialize(cluster=st.integers(500, 9_000), team=st.integers(300, 5_000), each=st.integers(200, 3_000))
    def begin(self, cluster: int, team: int, each: int) -> None:
        self.limits = {"cluster": cluster, "team:a": team, **{f"key:{name}": each for name in KEYS}}
        of = rules(budget(team), budget(cluster))
        self.books = treasury(of, budget(each))
        self.now_s = self.wall_s = 0.0
        self.open: dict[bytes, dict[int, tuple[HoldAsked, int]]] = {}
        self.fronts: dict[bytes, str] = {}
        self.count = 0
        self.billed = 0
        self.records: dict[bytes, int] = {}
        self.overshoot = 0

    @rule(
        prompt=st.integers(1, 60),
        most=st.integers(1, 60),
        name=st.sampled_from(sorted(KEYS)),
        front=st.sampled_from(["f1", "f2"]),
        priority_class=st.sampled_from(["default", "batch"]),
    )
    def begin_request(self, prompt: int, most: int, name: str, front: str, priority_class: str) -> None:
        self.count += 1
        asked = ask(
            self.count,
            prompt_tokens=prompt,
            output_tokens_max=most,
            key_id=name,
            team=KEYS[name],
            priority_class=priority_class,
        )
        self._hold(asked, front)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), most=st.integers(1, 30))
    def begin_sibling(self, data: st.DataObject, most: int) -> None:
        uid = data.draw(st.sampled_from(sorted(self.open)))
        first = self.open[uid][0][0]
        part = data.draw(st.integers(0, 3))
        if part not in self.open[uid]:
            self._hold(
                msgspec.structs.replace(first, part=part, prompt_tokens=0, output_tokens_max=most), self.fronts[uid]
            )

    def _hold(self, asked: HoldAsked, front: str) -> None:
        refused = self.books.hold(asked, front, self.now_s, self.wall_s)
        if refused is None:
            held = self.books.granted(asked, self.now_s)
            assert held is not None
            self.open.setdefault(asked.uid, {})[asked.part] = asked, held.granted_tokens
            self.fronts[asked.uid] = front

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        uid = data.draw(st.sampled_from(sorted(self.open)))
        part = data.draw(st.sampled_from(sorted(self.open[uid])))
        asked, granted = self.open[uid][part]
        more = self.books.extend(uid, part, granted, self.now_s)
        assert more is not None and granted <= more <= asked.output_tokens_max
        self.open[uid][part] = asked, more

    @precondition(lambda self: self.open)
    @rule(data=st.data(), again=st.booleans())
    def settle(self, data: st.DataObject, again: bool) -> None:
        uid = data.draw(st.sampled_from(sorted(self.open)))
        parts = self.open.pop(uid)
        prompt = sum(asked.prompt_tokens for asked, _ in parts.values())
        cached = data.draw(st.integers(0, prompt))
        output = data.draw(st.integers(0, sum(granted for _, granted in parts.values())))
        told = record(parts[min(parts)][0], prompt, cached, output)
        settled, ended = self.books.settle(told, self.now_s, self.wall_s)
        assert ended
        self.records[uid] = settled.amount
        if not again:
            self.books.booked(uid, settled.amount)
        else:
            # Before the ledger has it.
            assert not self.books.settle(told, self.now_s, self.wall_s)[1]
            self.books.booked(uid, settled.amount)
            self.books.booked(uid, 0)

    @rule(front=st.sampled_from(["f1", "f2"]), back=st.booleans())
    def leave(self, front: str, back: bool) -> None:
        self.books.left(front, self.now_s)
        if back:
            mine = [uid for uid in self.open if self.fronts[uid] == front]
            told = [PartTold(*part) for uid in mine for part in self.open[uid].values()]
            assert self.books.told(front, told, self.now_s, self.wall_s) == []
            return
        self.now_s += 31.0
        self.wall_s += 31.0
        for estimated in self.books.due(self.now_s, self.wall_s):
            assert self.fronts[estimated.uid] == front
            del self.open[estimated.uid]
            self.records[estimated.uid] = estimated.amount

    @rule(hours=st.integers(0, 30))
    def wait(self, hours: int) -> None:
        self.now_s += hours * 3600.0
        self.wall_s += hours * 3600.0

    @rule()
    def new_leader(self) -> None:
        """Another one takes over with the ledger's totals, and both front proxies tell what runs."""
        former = self.books
        totals = {}
        for name in self.limits:
            account = former.account(name, self.now_s, self.wall_s)
            totals[name, "day", account.starts[0]] = account.spents[0].settled
        self.books = treasury(former.rules, budget(self.limits["key:ka0"]))
        self.books.load(totals, self.now_s, self.wall_s)
        self.books.expect(["f1", "f2"], self.now_s)
        for front in ("f1", "f2"):
            mine = [uid for uid in self.open if self.fronts[uid] == front]
            told = [PartTold(*part) for uid in mine for part in self.open[uid].values()]
            self.books.told(front, told, self.now_s, self.wall_s)

    @invariant()
    def budgets_hold(self) -> None:
        if not hasattr(self, "books"):
            return
        self.books.check()
        assert self.books.holds == len(self.open)
        for name, limit in self.limits.items():
            spent = self.books.account(name, self.now_s, self.wall_s).spents[0]
            assert spent.settled + spent.held + spent.late <= limit, (name, limit)


# A new leader counts what runs against the windows of the takeover, so no midnight passes here while requests run.
Books.wait = precondition(lambda self: not self.open)(Books.wait)  # type: ignore[method-assign]
TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
