"""deploy/ray and docs/ray.md as Ray, Kubernetes and Baton read them: schemas and commands. Nothing is started."""

from __future__ import annotations

import itertools
import re
import shlex
from typing import Any

import click
import pytest
import yaml
from ray.autoscaler._private import util
from ray.scripts.scripts import cli

from cli.app import app
from cli.settings import Sources, load
from launcher.ray.placement import ACCELERATOR_LABEL, ZONE_LABEL
from tests.deploy.helm import ROOT
from tests.deploy.schemas import problems

FOLDER = ROOT / "deploy" / "ray"
PAGE = (ROOT / "docs" / "ray.md").read_text()
CLUSTER = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
RAYCLUSTER = yaml.safe_load((FOLDER / "raycluster.yaml").read_text())
GROUPS = [RAYCLUSTER["spec"]["headGroupSpec"], *RAYCLUSTER["spec"]["workerGroupSpecs"]]


def commands() -> list[str]:
    """Lines of code of the page, and what it names in a sentence or in the clusters, if Ray's or Baton's."""
    lines = re.findall(r"^    (\S.*)$", PAGE.replace("\\\n", " "), re.MULTILINE)
    lines += re.findall(r"`((?:ray|baton) [^`]+)`", PAGE + "".join(path.read_text() for path in FOLDER.iterdir()))
    lines += [*CLUSTER["head_start_ray_commands"], *CLUSTER["worker_start_ray_commands"]]
    found = (re.sub(r"^([A-Z_]+=\S+ )+", "", line) for line in lines)
    return sorted({line for line in found if line.startswith(("ray ", "baton "))})


def check_ray(words: list[str]) -> None:
    """Raise click.ClickException for words that Ray's command line does not take."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        command = command.commands[words.pop(0)]
    command.make_context("ray", words)


def check_baton(words: list[str]) -> None:
    """Raise for words that Baton's command line does not take, and for settings that it does not have."""
    app.parse_args(words, print_error=False, exit_on_error=False)
    load(Sources(sets=[value for word, value in itertools.pairwise(words) if word == "--set"]))


@pytest.mark.parametrize("line", commands())
def test_ray_and_baton_take_every_command(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "ray":
        check_ray(list(words))
        program, *words = words[words.index("--") + 1 :] if "--" in words else ["ray"]
    if program == "baton":
        check_baton(words)


def test_ray_takes_its_cluster() -> None:
    util.validate_config(util.prepare_config(CLUSTER))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: str(group.get("groupName", "head")))
def test_kubernetes_takes_the_pods_of_kuberays_cluster(group: dict[str, Any]) -> None:
    assert problems({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}) == ()
    check_ray(["start", *(f"--{name}={value}" for name, value in group["rayStartParams"].items())])


def test_they_have_the_pinned_ray_and_the_labels_by_which_processes_are_placed() -> None:
    pins = (ROOT / "requirements" / "ray.txt").read_text().split()
    assert f"ray=={RAYCLUSTER['spec']['rayVersion']}" in pins
    for each in (CLUSTER["available_node_types"]["engines"], GROUPS[-1]):
        assert {ACCELERATOR_LABEL, ZONE_LABEL} <= each["labels"].keys()
