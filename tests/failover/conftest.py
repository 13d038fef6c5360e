"""Clusters with a spare worker. In a package of its own: the e2e cluster and the plain server have ended before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.demo import model as demo_model


@pytest.fixture(scope="package")
def model_dir() -> Path:
    return demo_model.ensure()
