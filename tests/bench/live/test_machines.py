"""Machines of a fixed share of CPU: processes get them, and none is left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bench.live import machines
from runtime.user_error import UserError


def test_processes_get_a_share_and_the_group_is_gone_afterwards() -> None:
    root = next((each for each in machines.ROOTS if (each / "cgroup.procs").exists()), None)
    if root is None or not os.access(root, os.W_OK) or os.getuid():
        pytest.skip("no cgroup of CPU is writable here")
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            with machines.each_of(0.5) as give:
                give("decode-0", [process.pid])
                (group,) = root.glob(f"baton-bench-{os.getpid()}-*")
                assert (group / "cgroup.procs").read_text().split() == [str(process.pid)]
                files = [group / name for name in ("cpu.cfs_quota_us", "cpu.max") if (group / name).exists()]
                assert files[0].read_text().split()[0] == str(machines.PERIOD_US // 2)
            assert not list(root.glob(f"baton-bench-{os.getpid()}-*"))
        finally:
            process.kill()


def test_where_there_is_no_cgroup_it_is_said(tmp_path: Path) -> None:
    with machines.each_of(0.0, [tmp_path]) as give:
        give("decode-0", [os.getpid()])
    with pytest.raises(UserError, match=r"cannot get 0\.5 cores"), machines.each_of(0.5, [tmp_path / "none"]) as give:
        give("decode-0", [os.getpid()])
