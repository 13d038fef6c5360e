"""One rank: what it stages, when it votes, and what it never takes again."""

from __future__ import annotations

from engine.expert_map import ExpertMap
from engine.expert_rank import Abort, Arm, ExpertRank, Stage
from tests.engine.test_expert_map import SLOTS

FIRST, SECOND = ExpertMap.shared(3, SLOTS), ExpertMap.shared(3, SLOTS[::-1].copy())


def rank() -> ExpertRank:
    return ExpertRank(7, 1, slots_shape=(2, 2, 2), experts=3)


def stage(version: int, placed: ExpertMap = FIRST, leader_epoch: int = 1, epoch: int = 7) -> Stage:
    return Stage(epoch=epoch, leader_epoch=leader_epoch, version=version, placed=placed)


def arm(version: int, leader_epoch: int = 1) -> Arm:
    return Arm(epoch=7, leader_epoch=leader_epoch, version=version)


def abort(version: int, leader_epoch: int = 1) -> Abort:
    return Abort(epoch=7, leader_epoch=leader_epoch, version=version)


def after(*commands: Stage | Arm | Abort) -> ExpertRank:
    one = rank()
    for command in commands:
        one.handle(command)
    return one


def reduced(*ranks: ExpertRank) -> list[int]:
    return [min(numbers) for numbers in zip(*(one.vote() for one in ranks), strict=True)]


def test_a_map_goes_live_where_all_have_armed_the_same() -> None:
    both = [after(stage(1), arm(1)) for _ in range(2)]
    assert [one.agreed(reduced(*both)) for one in both] == [FIRST, FIRST]
    both[0].applied(FIRST.digest)
    report = both[0].report()
    assert (report.live_version, report.live_digest, report.staged_version, report.armed) == (1, FIRST.digest, 0, False)
    assert both[0].vote() == (0, 0, 0, 0)


def test_ranks_that_differ_in_anything_change_nothing() -> None:
    ready = after(stage(1), arm(1))
    for other in (
        rank(),
        after(stage(1)),
        after(stage(1, SECOND), arm(1)),
        after(stage(2), arm(2)),
        after(stage(1), arm(1), abort(1)),
    ):
        assert [one.agreed(reduced(ready, other)) for one in (ready, other)] == [None, None]


def test_an_arm_is_for_the_version_that_is_staged_and_a_newer_stage_replaces_it() -> None:
    assert not after(stage(2), arm(1)).report().armed
    assert not after(arm(1), stage(1)).report().armed
    report = after(stage(1), arm(1), stage(2, SECOND)).report()
    assert (report.staged_version, report.staged_digest, report.armed) == (2, SECOND.digest, False)
    assert after(stage(2), stage(1, SECOND)).report().staged_digest == FIRST.digest


def test_what_is_over_is_never_taken_up_again() -> None:
    one = after(stage(1), arm(1), abort(1), stage(1), arm(1))
    assert one.report().staged_version == 0 and one.report().void_version == 1
    one = after(stage(1), arm(1))
    one.applied(FIRST.digest)
    one.handle(stage(1, SECOND))
    one.handle(abort(1))
    assert (one.report().live_version, one.report().staged_version) == (1, 0)


def test_another_epoch_and_an_earlier_scheduler_are_not_heard() -> None:
    assert after(stage(1, epoch=6)).report().staged_version == 0
    assert after(abort(0, leader_epoch=5), stage(1, leader_epoch=4)).report().staged_version == 0
    assert after(stage(1, leader_epoch=4), abort(0, leader_epoch=5), arm(1, leader_epoch=4)).report().armed is False


def test_a_map_for_other_ranks_is_refused_in_a_sentence() -> None:
    wide = ExpertMap.shared(3, SLOTS[:1])
    report = after(stage(1, wide)).report()
    assert report.staged_version == 0
    assert (
        report.refused == "a map of (1, 2, 2) for 3 experts does not fit (2, 2, 2) [layers, ranks, slots] of 3 experts"
    )
    one = after(stage(1, wide), stage(2))
    assert one.report().refused == ""
