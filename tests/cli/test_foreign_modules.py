"""Modules with the names of Baton's packages, in the working folder and on PYTHONPATH: Baton's own are imported."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import baton_llm
from tests.cli import foreign_modules
from tests.cli.foreign_modules import ROOT

TIMEOUT_S = 60

# What vLLM does: it spawns engine processes, and starts Python anew for its registry of models.
LIBRARY = """
import importlib, multiprocessing, subprocess, sys
import baton_llm
import own_plugin
sys.modules["__main__"].__file__ = baton_llm.command()[-1]
engine = multiprocessing.get_context("spawn").Process(target=importlib.import_module, args=("worker.config",))
engine.start()
engine.join()
assert engine.exitcode == 0, "spawned"
subprocess.run([sys.executable, "-c", "import runtime.process.logs, own_plugin"], check=True)
"""


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it in ``folder``, which also goes before Baton on PYTHONPATH, as where Baton is installed."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_the_installed_command_and_a_child_process_run_baton(tmp_path: Path) -> None:
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["baton"].partition(":")
    script = tmp_path / "bin" / "baton"
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {module} import {name}\nsys.exit({name}())\n")
    for command in ([sys.executable, str(script), "config"], baton_llm.command("config")):
        done = run(command, foreign_modules.write(tmp_path / "folder"))
        assert done.stdout.startswith("# every setting has its default"), done.stderr


@pytest.mark.parametrize("package", ["bench", "cli", "simulation"])
def test_a_package_that_is_run_by_hand_imports_the_others_of_baton(package: str, tmp_path: Path) -> None:
    done = run([sys.executable, "-m", package, "--help"], foreign_modules.write(tmp_path, without=[package]))
    assert "Usage" in done.stdout, done.stderr


def test_processes_that_a_library_starts_find_baton_and_a_plugin_on_the_path(tmp_path: Path) -> None:
    foreign_modules.write(tmp_path)
    (tmp_path / "own_plugin.py").touch()
    done = run([sys.executable, "-P", "-c", LIBRARY], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_starter_is_in_the_wheel() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "baton_llm.py" in wheel["packages"]
