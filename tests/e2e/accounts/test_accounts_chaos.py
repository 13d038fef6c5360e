"""One record a request, of what its client saw, whatever process is killed or cut off: `baton chaos` with accounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.accounts.test_accounts import RULES
from tests.e2e.conftest import SERVED, Alive
from tests.e2e.test_chaos import chaos

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(autouse=True)
def _alone(alive: Alive) -> None:
    alive.end()


def accounts(tmp_path: Path) -> list[str]:
    """Enforced, with a budget that is not reached: a new leader must learn what is held before it grants more."""
    rules = tmp_path / "rules.toml"
    rules.write_text(f'{RULES}[teams.chaos]\nbudgets = ["1000/month"]\n')
    served = f"engine.served_model_name={SERVED}"
    settings = (served, "auth.mode=required", "accounts.mode=enforce", f"accounts.rules_file={rules}")
    return [word for setting in settings for word in ("--set", setting)]


def test_records_are_what_clients_saw_while_schedulers_and_workers_fail(tmp_path: Path) -> None:
    code, report, said = chaos(
        tmp_path, *accounts(tmp_path), "--prefill", "2", "--decode", "2", "--front-proxies", "1", "--seed", "7",
        "--faults", "kill,freeze", "--freeze-s", "2", "--roles", "scheduler,prefill,decode",
        "--set", "front_proxy.stream_stall_timeout_s=1",
    )  # fmt: skip
    assert code == 0, said
    # No front proxy died, so nothing may be missing and nothing guessed.
    assert report["usage"]["estimated"] == 0 and report["usage"]["records"] > 100, said


def test_a_front_proxy_that_is_killed_costs_its_own_records_alone(tmp_path: Path) -> None:
    code, report, said = chaos(
        tmp_path, *accounts(tmp_path), "--prefill", "1", "--decode", "1", "--front-proxies", "3", "--seed", "8",
        "--faults", "kill", "--roles", "front_proxy",
    )  # fmt: skip
    assert code == 0, said
    assert report["usage"]["records"] > 100, said
