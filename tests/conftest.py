"""What every test shares: GPU tests are left out where there is no GPU, and hypothesis repeats itself."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import settings

import runtime.logs  # noqa: F401 - logs pass through the standard library, where caplog finds them

# The same examples every time: a failure in CI is the failure everybody sees. The simulation is where seeds vary.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect ``gpu`` tests on a machine without an NVIDIA driver."""
    if shutil.which("nvidia-smi") is not None:
        return
    without = [item for item in items if item.get_closest_marker("gpu") is not None]
    items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
    if without:
        config.hook.pytest_deselected(items=without)
