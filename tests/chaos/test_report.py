"""A run that ended early has a verdict too: what went wrong, which process is not back, and its last log lines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chaos import real_run
from chaos.cluster import ChaosCluster
from chaos.report import ChaosReport, NotBack, as_text
from chaos.schedule import FAULT_KINDS
from launcher.local.process_plan import ProcessSpec
from launcher.local.state_file import ClusterRecord, ClusterState, ProcessRecord
from launcher.local.status import StatusLine


def test_a_report_names_the_process_that_is_not_back_and_ends_with_the_verdict() -> None:
    lost = NotBack(process_id="decode-0", state="dead", why="twice", log="/l/decode-0.log", log_tail=["a", "b"])
    text = as_text(ChaosReport(seed=3, passed=False, error="not within 1 s: all of it", not_back=[lost]))
    lines = text.splitlines()
    assert "ended early: not within 1 s: all of it" in lines
    assert "decode-0 is dead (twice); the last lines of /l/decode-0.log:" in lines
    assert lines[-3:-1] == ["    a", "    b"]
    assert lines[-1].startswith("FAILED (seed 3")
    assert "held" not in text, "no process answered"


async def test_a_process_that_does_not_serve_is_found_with_the_last_lines_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "decode-0.log"
    log.write_text("first\nlast words\n")
    gone = ProcessRecord(id="decode-0", role="decode", pid=2**22 + 1, state="ready", log=str(log))
    ClusterState(tmp_path, ClusterRecord(launcher_pid=os.getpid(), model="m", processes=(gone,)), print)
    (found,) = await ChaosCluster(tmp_path, (), print).not_back()
    assert (found.process_id, found.state, found.log_tail) == ("decode-0", "dead", ["first", "last words"])


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


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_every_kind_either_ends_its_process_or_leaves_it(kind: str) -> None:
    from chaos.schedule import replaces

    assert replaces(kind) == (kind in {"kill", "terminate", "restart"})  # type: ignore[arg-type]
