"""Which suite a test belongs to, what every test shares, and the list of the slowest tests."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter
from hypothesis import settings

import runtime.process.logs  # noqa: F401 - so that caplog sees events, whichever test runs first

ROOT = Path(__file__).parent
# A path belongs to the suite that names it or a folder above it. All others are unit tests, which never import vLLM.
SUITES = {
    "sim": ("simulation", "chaos/test_virtual_run.py"),
    "engine": (
        "bench/experts/test_compare.py",
        "bench/test_bench_model.py",
        "contract/test_block_events.py",
        "contract/test_engine_contract.py",
        "contract/test_mamba.py",
        "contract/test_metrics_documented.py",
        "contract/test_tiers.py",
        "contract/test_vllm_surface.py",
        "contract/test_wrong_kv.py",
        "engine/test_preflight.py",
        "engine/vllm/test_args.py",
        "engine/vllm/test_experts.py",
        "engine/vllm/test_grammar.py",
        "engine/vllm/test_grammar_backends.py",
        "engine/vllm/test_kv_events.py",
        "engine/vllm/test_parsed_args.py",
        "engine/vllm/test_steps.py",
        "front_proxy/engine_client",
        "front_proxy/grpc_api/test_service.py",
        "front_proxy/openai_api",
        "front_proxy/test_broken_streams.py",
        "front_proxy/test_run.py",
        "kv_transfer/nixl",
        "kv_transfer/offload",
        "kv_transfer/stores",
        "launcher/demo",
        "launcher/local/test_temp_dirs.py",
    ),
    # Run by `make prove` only: minutes of killed processes.
    "long": (
        "contract/test_tier_sizes.py",
        "e2e/accounts/test_accounts_chaos.py",
        "e2e/accounts/test_canary.py",
        "e2e/experts/test_phases.py",
        "e2e/experts/test_pools.py",
        "e2e/scaling/test_flip_broken.py",
        "e2e/security/test_tls_chaos.py",
        "e2e/test_chaos_schedulers.py",
        "e2e/several_nodes/test_worker_on_two_nodes.py",
        "launcher/ray/test_real_engines.py",
        "launcher/ray/test_scaling.py",
    ),
    "ray": ("launcher/ray/test_backend_contract.py", "launcher/ray/test_host.py", "launcher/ray/test_up.py"),
    "e2e": ("e2e",),
}
SLOWEST_MAX = 25

# The same examples every time: a failure in CI is the failure on every machine. The simulation is where seeds vary.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def suite_of(path: Path) -> str:
    """The suite of a test file."""
    below = path.relative_to(ROOT)
    for suite, places in SUITES.items():
        if any(below.is_relative_to(place) for place in places):
            return suite
    return "unit"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--suite=unit|sim|engine|long|ray|e2e`` runs one suite; without it all run."""
    parser.addoption("--suite", choices=["unit", *SUITES], help="run one suite (tests/conftest.py says which is where)")
    parser.addoption("--slowest", metavar="FILE", help=f"write the {SLOWEST_MAX} slowest tests there")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the files of other suites out before they are imported."""
    suite = config.getoption("--suite")
    if suite is None or not collection_path.is_file() or collection_path.suffix != ".py":
        return None
    return True if collection_path.name.startswith("test_") and suite_of(collection_path) != suite else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect ``gpu`` tests on a machine without an NVIDIA driver."""
    if shutil.which("nvidia-smi") is not None:
        return
    without = [item for item in items if item.get_closest_marker("gpu") is not None]
    items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
    if without:
        config.hook.pytest_deselected(items=without)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A unit test that imports vLLM belongs to another suite."""
    if item.config.getoption("--suite") == "unit":
        assert "vllm" not in sys.modules, f"{item.nodeid} imports vLLM: name its file in tests/conftest.py"


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """Write the slowest tests, the slowest first."""
    if (target := config.getoption("--slowest")) is None:
        return
    # Those of what passed before and after a test are under no name.
    reports = [report for kind in ("", "passed", "failed", "error") for report in terminalreporter.getreports(kind)]
    timed = sorted(reports, key=lambda report: -report.duration)[:SLOWEST_MAX]
    lines = [f"{report.duration:8.2f} s  {report.when:8}  {report.nodeid}\n" for report in timed]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text("".join(lines))
