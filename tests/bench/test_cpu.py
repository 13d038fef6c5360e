"""CPU seconds of process trees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.cpu import ProcessCpu, read, used


def process(pid: int, parent_pid: int, title: str, cpu_s: float = 0.0) -> ProcessCpu:
    return ProcessCpu(pid=pid, parent_pid=parent_pid, title=title, cpu_s=cpu_s)


def tree(**cpu_s: float) -> dict[int, ProcessCpu]:
    listed = [
        process(1, 0, "python -m bench.plain_server", cpu_s.get("api", 0.0)),
        process(2, 1, "VLLM::EngineCore", cpu_s.get("core", 0.0)),
        process(3, 2, "VLLM::Worker", cpu_s.get("rank", 0.0)),
        process(4, 3, "python compile helper", cpu_s.get("helper", 0.0)),
        process(5, 1, "python resource tracker", cpu_s.get("tracker", 0.0)),
    ]
    return {one.pid: one for one in listed}


def test_use_is_split_between_the_engine_core_with_all_below_it_and_everything_else() -> None:
    late = {6: process(6, 1, "python late", 0.75)}
    use = used(tree(api=1.0, core=5.0), tree(api=1.5, core=6.0, rank=2.0, helper=0.25, tracker=0.125) | late)
    assert use.engine_s == pytest.approx(3.25)
    assert sorted(use.other_by_process.values()) == pytest.approx([0.125, 0.5, 0.75])
    assert use.other_s == pytest.approx(1.375)


def test_a_real_child_that_burns_cpu_is_seen() -> None:
    code = "n=0\nfor i in range(5_000_000): n+=i\nprint('done', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        seen = read([child.pid])
        assert seen[child.pid].cpu_s > 0.0
        assert seen[child.pid].parent_pid == os.getpid()
        child.stdin.close()


def test_a_root_that_has_gone_reads_as_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert read([child.pid]) == {}
