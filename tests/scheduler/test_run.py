"""What a scheduler process starts from."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from scheduler.cluster.latency_profile import ASSUMED, BadLatencyProfile
from scheduler.config import SchedulerConfig
from scheduler.run import profile_of


def test_predictions_start_from_the_file_that_is_named(tmp_path: Path) -> None:
    assert profile_of(SchedulerConfig()) is ASSUMED
    profile = msgspec.structs.replace(ASSUMED, chunk_tokens=8192)
    file = tmp_path / "profile.json"
    file.write_bytes(msgspec.json.encode(profile))
    assert profile_of(SchedulerConfig(latency_profile=str(file))) == profile
    with pytest.raises(BadLatencyProfile, match="cannot be read"):
        profile_of(SchedulerConfig(latency_profile=str(tmp_path)))
