"""`baton chaos` where all connections inside the cluster have certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Alive
from tests.e2e.test_chaos import chaos
from tests.runtime.rpc.made_ca import MadeCa

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(autouse=True)
def _alone(alive: Alive) -> None:
    alive.end()


def test_certificates_change_nothing_about_what_a_cluster_survives(tmp_path: Path) -> None:
    ca = MadeCa(tmp_path)
    inner = ca.sign("inner", days=5)
    settings = (f"tls.cert_file={inner.cert}", f"tls.key_file={inner.key}", f"tls.ca_file={ca.file}")
    words = [word for setting in settings for word in ("--set", setting)]
    code, _, said = chaos(
        tmp_path, *words, "--prefill", "2", "--decode", "2", "--seed", "11", "--faults", "kill,freeze,restart,cut",
        "--freeze-s", "2", "--roles", "scheduler,prefill,decode", "--set", "front_proxy.stream_stall_timeout_s=1",
    )  # fmt: skip
    assert code == 0, said
