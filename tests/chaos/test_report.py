"""When a cluster counts as whole again, and the verdict of a run that ended before its time."""

from __future__ import annotations

from pathlib import Path

from chaos import real_run
from chaos.cluster import ChaosCluster
from launcher.backend import ProcessSpec
from launcher.hosted.status import StatusLine


class Returning(ChaosCluster):
    """A cluster with a decode worker that finds the scheduler late."""

    def __init__(self, folder: Path, *known: int) -> None:
        super().__init__(folder, (), print)
        self.known = list(known)

    async def status(self) -> list[StatusLine]:
        scheduler = StatusLine(id="s", role="scheduler", state="ready", workers_ready=self.known.pop(0))
        return [scheduler, StatusLine(id="d", role="decode", pid=2, state="ready")]


async def test_a_cluster_is_whole_again_only_once_its_scheduler_knows_every_process(tmp_path: Path) -> None:
    cluster = Returning(tmp_path, 1, 0, 0, 1, 1, 9)
    await cluster.whole_again("d", instead_of_pid=None, timeout_s=60)
    assert cluster.known == [9]


def test_a_cluster_that_does_not_start_is_a_failed_run(tmp_path: Path) -> None:
    options = real_run.ChaosOptions(
        state_dir=tmp_path / "state",
        up_arguments=("--set", "launcher.nothing=1"),
        specs=(ProcessSpec(id="scheduler", role="scheduler"),),
    )
    report = real_run.run(options, lambda _: None)
    assert (report.passed, report.exit_code) == (False, 2)
    assert "ended before it was ready" in report.error
    assert (report.not_back, report.faults) == ([], [])
