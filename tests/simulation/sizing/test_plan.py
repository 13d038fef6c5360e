"""The planner: objectives, the ratio law, the search over splits, and the whole command on made traffic."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from cli.app import main
from scheduler.cluster.step_law import LinkLaw
from simulation.replay.generators import made
from simulation.replay.report import BadSlo
from simulation.replay.traces import Arrival, Trace
from simulation.sizing import closed_form, html_report, search
from simulation.sizing.answer import as_table
from simulation.sizing.bisection import Bisection
from simulation.sizing.closed_form import Split
from simulation.sizing.limits import limit
from simulation.sizing.objective import Kept, Objective
from simulation.sizing.search import Sizing
from simulation.sizing.trial import Job, Trial, Trials, Use, Workload, run
from tests.simulation.replay.models import KEY_TOKENS, cluster_model


def trace(requests: int = 400, prompt: int = 1000, output: int = 100) -> Trace:
    arrivals = [Arrival(arrived_s=n / 2, prompt_tokens=prompt, output_tokens=output) for n in range(requests)]
    return Trace(key_tokens=KEY_TOKENS, arrivals=arrivals)


OBJECTIVE = Objective.parse("ttft=2,itl=0.05")


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("", {"all": 0.9}),
        ("ttft=2,itl=0.05", {"all": 0.9}),
        ("ttft_p99=2,itl_p99=0.05", {"ttft": 0.99, "itl": 0.99}),
        ("ttft_p99.9=2, itl=0.05", {"ttft": 0.999, "itl": 0.9}),
    ],
)
def test_an_slo_names_bounds_and_shares(text: str, targets: dict[str, float]) -> None:
    found = Objective.parse(text)
    assert found.targets == pytest.approx(targets)
    if text:
        assert (found.slo.ttft_s, found.slo.itl_s) == (2, 0.05)
    assert not found.missed(Kept(all=1.0, ttft=1.0, itl=1.0))


@pytest.mark.parametrize("text", ["ttft", "ttft=fast", "tpot=1", "ttft_p100=1", "itl=-1", "ttft=1,ttft_p99=2"])
def test_what_is_no_slo_is_named(text: str) -> None:
    with pytest.raises(BadSlo, match=re.escape(text.rsplit(",", maxsplit=1)[-1]) + "|twice"):
        Objective.parse(text)


def test_the_law_gives_more_workers_to_what_takes_longer() -> None:
    model = cluster_model(kv_blocks_total=10_000, link=LinkLaw(gigabytes_per_s=100.0))

    def best(prompt: int, output: int) -> Split:
        asked = closed_form.demand(trace(prompt=prompt, output=output), model, OBJECTIVE, caches=8)
        return max(
            closed_form.all_splits(8)[1:], key=lambda split: closed_form.capacity_rps(split, asked, model, OBJECTIVE)
        )

    assert best(4000, 20).prefill > best(1000, 100).prefill > best(100, 1000).prefill


def test_prefixes_that_are_held_need_no_prefill() -> None:
    shared = [
        Arrival(arrived_s=float(n), prompt_tokens=640, output_tokens=9, block_keys=tuple(range(9))) for n in range(9)
    ]
    asked = closed_form.demand(Trace(key_tokens=KEY_TOKENS, arrivals=shared), cluster_model(), OBJECTIVE, caches=1)
    assert asked.uncached_tokens == pytest.approx((640 + 8 * 64) / 9)


class Landscape:
    """Trials of a cluster whose splits keep the SLO up to a rate of their own. Remembers what was run."""

    def __init__(self, highest_rps: dict[int, float], lasts_s: float = 1.0) -> None:
        self.lasts_s = lasts_s
        self.workload = Workload(trace=trace(), model=cluster_model(), objective=OBJECTIVE)
        self._highest_rps = highest_rps
        self.jobs: list[Job] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
        self.jobs += jobs
        for job in jobs:
            share = min(1.0, 0.9 * self._highest_rps.get(job.split.prefill, 0.1) / job.rate_rps + 0.001 * job.seed)
            yield Trial(
                job=job,
                goodput_rps=share * job.rate_rps,
                kept=Kept(all=share, ttft=share, itl=1.0),
                **dict.fromkeys(("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s"), 1.0 / share),
                output_tokens_per_s=1.0,
                hit_ratio=0.0,
                whole=0.0,
                refused={},
                preemptions=0,
                fills=len(self.workload.trace.arrivals) / job.rate_rps / self.lasts_s,
                use=Use(prefill=0.9, decode=0.5, decode_kv=0.2, network=0.1),
            )


def test_the_best_split_wins_and_every_split_is_told() -> None:
    cluster = Landscape({0: 4.0, 1: 6.0, 2: 9.0, 3: 7.0})
    found = search.plan(cluster, Sizing(workers=4, rate_rps=10.0, seeds=3))
    assert (found.best, found.runner_up) == (Split(prefill=2, decode=2), Split(prefill=3, decode=1))
    assert [row.prefill for row in found.rows] == [0, 1, 2, 3, 4]
    assert found.regret == pytest.approx(2 / 9, rel=0.02)
    assert found.confidence == pytest.approx(4 / 5)
    assert found.missed["all"] == pytest.approx(0.09, abs=0.01)
    assert found.best_row.highest_rps == pytest.approx(9.0, rel=0.04)
    assert [(change.prefill, change.decode) for change in found.changes] == [(3, 2), (2, 3), (1, 2), (2, 1)]
    assert "No split keeps the SLO" in as_table(found)


def test_of_splits_that_all_keep_it_the_one_with_headroom_wins() -> None:
    cluster = Landscape({0: 4.0, 1: 6.0, 2: 9.0, 3: 7.0})
    found = search.plan(cluster, Sizing(workers=4, rate_rps=1.0, seeds=2))
    assert found.best == Split(prefill=2, decode=2)
    assert found.best_row.highest_rps == pytest.approx(9.0, rel=0.04)
    assert not found.missed
    assert found.headroom is not None
    assert found.headroom > 0.2


def test_a_rate_at_which_the_trace_is_over_before_the_cluster_is_full_is_not_kept() -> None:
    found = search.plan(Landscape({0: 4.0, 1: 100.0}, lasts_s=20.0), Sizing(workers=2, rate_rps=2.0, seeds=1))
    assert found.best_row.highest_rps == pytest.approx(4.0, rel=0.03)  # 400 requests in 100 s, five times 20 s
    assert found.notes[-1].startswith("Highest rates may be higher")
    found = search.plan(Landscape({0: 4.0, 1: 100.0}, lasts_s=20.0), Sizing(workers=2, rate_rps=5.0, seeds=1))
    assert found.notes[-1].startswith("Too short: requests came for 4.0 times")
    # No request was over at all: that is not for want of time.
    found = search.plan(Landscape({0: 4.0, 1: 4.0}, lasts_s=math.inf), Sizing(workers=2, rate_rps=5.0, seeds=1))
    assert not any("short" in note for note in found.notes)


def test_what_fills_a_cluster_up_waits_and_is_computed_before_it_decodes() -> None:
    asked = closed_form.demand(trace(output=100), cluster_model(), OBJECTIVE, caches=1)
    # Five times what a request may last: 2 s to its first token, then 0.05 s for each.
    assert closed_form.filling(asked, OBJECTIVE, 10.0) == pytest.approx(5 * 10 * (2 + 5), abs=1)


def test_staying_together_may_win() -> None:
    assert search.plan(Landscape({0: 9.0, 1: 5.0}), Sizing(workers=2, rate_rps=9.0, seeds=1)).best.prefill == 0


def test_many_workers_are_searched_near_the_law() -> None:
    cluster = Landscape(dict.fromkeys(range(64), 9.0))
    found = search.plan(cluster, Sizing(workers=64, rate_rps=9.0, seeds=1, bisects=False))
    assert len(found.rows) == 2 + 2 * search.NEIGHBOURS + 1
    assert found.rows[0].collocated


def test_the_fewest_workers_for_a_rate_are_found() -> None:
    class Grows(Landscape):
        def run(self, jobs: Sequence[Job]) -> Iterator[Trial]:
            for job in jobs:
                self._highest_rps = {job.split.prefill: 2.0 * job.split.workers}
                yield from super().run([job])

    found = search.smallest(Grows({}), Sizing(workers=32, rate_rps=9.0, seeds=1, bisects=False))
    assert found.workers == 5
    assert not found.missed


def test_the_limit_is_told_in_words() -> None:
    (trial,) = Landscape({2: 5.0}).run([Job(split=Split(prefill=2, decode=2), rate_rps=10.0, seed=0)])
    assert limit(trial, OBJECTIVE) == "prefill workers (90%): first tokens are late"
    slow = replace(trial, kept=Kept(all=0.5, ttft=1.0, itl=0.5), preemptions=7)
    assert "7 preemptions" in limit(slow, OBJECTIVE)
    together = replace(slow, job=replace(trial.job, split=Split(prefill=0, decode=4)), preemptions=0)
    assert limit(together, OBJECTIVE) == "decode steps are too long: prompts are in them"
    late = replace(trial, refused={"ttft_slo": 0.4, "queue_full": 0.1})
    assert limit(late, OBJECTIVE) == "prefill workers (90%): 50% refused, as their first tokens would be late"
    idle = replace(late, use=replace(trial.use, prefill=0.1, decode_kv=0.0))
    assert limit(idle, OBJECTIVE).startswith("long prompts: 50% refused, as their first tokens would be late")
    assert limit(replace(trial, refused={"queue_full": 0.5}), OBJECTIVE).endswith("50% refused, as the queue is full")
    assert limit(replace(trial, kept=Kept(all=1, ttft=1, itl=1)), OBJECTIVE).startswith("none")


def test_equal_jobs_are_run_once_and_give_equal_trials() -> None:
    load = Workload(trace=trace(40), model=cluster_model(), objective=OBJECTIVE)
    jobs = [Job(split=Split(prefill=p, decode=2), rate_rps=2.0, seed=s) for p, s in itertools.product((0, 1), (0, 1))]
    with Trials(load, processes=1) as one, Trials(load, processes=2) as two:
        assert list(one.run(jobs + jobs)) == list(two.run(jobs + jobs))
        assert one.count == len(jobs)


def test_the_report_opens_offline() -> None:
    answer = search.plan(Landscape({0: 4.0, 1: 6.0, 2: 9.0}), Sizing(workers=4, rate_rps=10.0, seeds=1))
    page = html_report.page(answer, "a <title>", ["a fact"])
    assert page.count("<svg") == 4
    assert "a &lt;title&gt;" in page
    assert not re.search(r"(src|href)=|https?://|@import|<script", page)


def test_the_command_gives_the_same_bytes_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--workload", "agents", "--requests", "60", "--workers", "2", "--rate", "2", "--seeds", "1"]
    outputs: list[tuple[str, bytes, bytes]] = []
    for name in ("a", "b"):
        more = ["--json", f"{tmp_path}/{name}.json", "--html", f"{tmp_path}/{name}.html", "--processes", "1"]
        assert main([*words, *more]) == 0
        made_json, made_html = ((tmp_path / f"{name}.{kind}").read_bytes() for kind in ("json", "html"))
        outputs.append((capsys.readouterr().out, made_json, made_html))
    assert outputs[0] == outputs[1]
    found = json.loads(outputs[0][1])
    assert found["best"]["prefill"] + found["best"]["decode"] == 2
    assert {"prefill", "decode", "collocated", "goodput_rps", "ttft_p99_s", "itl_p99_s", "limit"} <= set(
        found["rows"][0]
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--workload", "agents"], "--workers or --gpus or --rate"),
        (["--workers", "2"], "one of --trace and --workload"),
        (["--workload", "agents", "--workers", "2", "--gpus", "2"], "not the first two together"),
        (["--workload", "agents", "--workers", "2", "--slo", "tpot=1"], "tpot=1"),
        (["--workload", "agents", "--workers", "2", "--attainment", "2"], "attainment: 2"),
        (["--trace", "none.jsonl", "--workers", "2"], "none.jsonl cannot be read"),
    ],
)
def test_a_wrong_option_is_named(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) != 0
    assert told in capsys.readouterr().err


def test_made_summaries_have_long_prompts() -> None:
    arrivals = made("summarisation", 200, 1.0, seed=1).arrivals
    assert sum(each.prompt_tokens for each in arrivals) > 20 * sum(each.output_tokens for each in arrivals)


def test_of_a_long_trace_only_contenders_get_more_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "REPLAYED_MAX", 0)
    cluster = Landscape({0: 4.0, 1: 6.0, 2: 9.0, 3: 7.0})
    found = search.plan(cluster, Sizing(workers=4, rate_rps=10.0, seeds=3, bisects=False))
    assert [row.seeds for row in found.rows] == [1, 3, 3, 3, 0]
    assert found.best == Split(prefill=2, decode=2)


def test_a_replay_that_asks_whether_the_slo_is_kept_ends_early_and_says_the_same() -> None:
    load = Workload(trace=trace(200, prompt=200, output=20), model=cluster_model(), objective=OBJECTIVE)
    for rate_rps in (0.2, 500.0):
        whole = Job(split=Split(prefill=1, decode=1), rate_rps=rate_rps, seed=0)
        short = replace(whole, asks_kept=True)
        both = [bool(OBJECTIVE.missed(run(load, job).kept)) for job in (whole, short)]
        assert both == [rate_rps > 1.0] * 2


def test_the_highest_rate_is_found_from_a_guess_in_few_steps() -> None:
    for highest, guess in ((23.0, 26.0), (23.0, 19.0), (2.0, 1.6), (23.0, 0.0)):
        search_ = Bisection(3.4, kept=highest > 3.4, guess_rps=guess)
        steps = 0
        while not search_.over:
            search_.tell(keeps=search_.next_rps <= highest)
            steps += 1
        assert highest / 1.03 <= search_.low_rps <= highest
        assert steps <= (7 if guess else 12)


def test_decode_workers_take_prompts_in_the_law_where_prefill_workers_are_few() -> None:
    model = cluster_model(kv_blocks_total=10_000, link=LinkLaw(gigabytes_per_s=100.0))
    asked = closed_form.demand(trace(prompt=2000, output=100), model, OBJECTIVE, caches=8)
    rates = [closed_form.capacity_rps(split, asked, model, OBJECTIVE) for split in closed_form.all_splits(8)]
    assert rates[1] > 0.7 * rates[0] > rates[7]
