"""Load 1.0, paired comparison, and the shape of the results of ``python -m bench routing``."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from PIL import Image

from bench.routing import plot, table
from bench.routing.capacity import NoCapacity, highest_speed, mean_kept
from bench.routing.table import Measured, Row


def row(policy: str, seed: int, goodput_rps: float, load: float = 1.0) -> Row:
    return Row(
        policy=policy,
        load=load,
        seed=seed,
        goodput_rps=goodput_rps,
        attainment=0.9,
        ttft_p50_s=0.5,
        ttft_p99_s=2.0 * load,
        itl_p99_s=0.03,
        hit_tokens=1000,
        decisions_per_s=20_000.0,
    )


@pytest.mark.parametrize("limit", [0.3, 1.0, 3.7, 11.0])
def test_load_one_is_found_to_two_percent(limit: float) -> None:
    limits = {"slow": limit / 2, "fast": limit, "middle": limit * 0.9}
    asked: list[tuple[str, float]] = []

    def keeps(policy: str, speed: float) -> bool:
        asked.append((policy, speed))
        return speed <= limits[policy]

    found = highest_speed(list(limits), keeps)
    assert limit / 1.02 <= found <= limit
    assert len(asked) == len(set(asked))
    # Who missed the target is not asked again at a higher rate.
    for index, (policy, speed) in enumerate(asked):
        missed = [at for who, at in asked[:index] if who == policy and at > limits[policy]]
        assert all(speed < at for at in missed)


def test_the_mean_of_the_seeds_counts_and_no_more_of_them_is_read_than_needed() -> None:
    assert mean_kept([0.8, 1.0], 2)
    assert not mean_kept([0.8, 0.99], 2)
    rest = iter([0.7, 0.7, 1.0, 1.0, 1.0])
    assert not mean_kept(rest, 5)
    assert len(list(rest)) == 3


def test_without_a_rate_that_keeps_the_slos_there_is_no_load_one() -> None:
    with pytest.raises(NoCapacity, match="attainment stays below 90% at "):
        highest_speed(["one"], lambda policy, speed: False)
    with pytest.raises(NoCapacity, match="attainment stays at least 90%"):
        highest_speed(["one"], lambda policy, speed: True)


def test_ours_is_compared_with_the_best_of_the_others_seed_by_seed() -> None:
    rows = [row("baton", 0, 9.9), row("baton", 1, 19.6), row("mooncake", 0, 10.0), row("mooncake", 1, 20.0)]
    rows += [row("round_robin", 0, 12.0), row("round_robin", 1, 1.0), row("baton", 0, 1.0, load=0.5)]
    found = table.paired(rows, 1.0)
    assert found is not None
    assert (found.rival, found.holds) == ("mooncake", True)
    assert found.ratio == pytest.approx(0.985)
    assert found.spread == pytest.approx(1.96 * 0.005, rel=0.01)
    assert table.paired(rows, 0.5) is None
    worse = table.paired([row("baton", 0, 9.7), row("mooncake", 0, 10.0)], 1.0)
    assert worse is not None
    assert not worse.holds


def test_the_table_names_the_best_first_and_says_where_ours_stands() -> None:
    measured = [Measured(row("baton", 0, 9.0), 1.2), Measured(row("dynamo", 0, 10.0), 1.1)]
    lines = table.text(measured, [1.0]).splitlines()
    assert lines[0] == "load 1"
    assert [line.split()[0] for line in lines[2:4]] == ["dynamo", "baton"]
    assert lines[4] == "baton: 0.900 ± 0.000 of dynamo's goodput: more than 2 % below the best"


def test_rows_have_the_fields_that_others_read() -> None:
    fields = "policy load seed goodput_rps attainment ttft_p50_s ttft_p99_s itl_p99_s hit_tokens decisions_per_s"
    assert list(msgspec.to_builtins(row("baton", 0, 1.0))) == fields.split()


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    rows = [row(policy, 0, load * 3, load) for policy in ("baton", "dynamo") for load in (0.5, 1.0)]
    plot.save(rows, "a trace", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 4
