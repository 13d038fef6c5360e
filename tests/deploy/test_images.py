"""What the Dockerfile promises, read from it: it is built where there is a builder, and none is needed here."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.deploy.helm import ROOT, rendered
from tests.test_repository import PACKAGES

TEXT = (ROOT / "deploy" / "Dockerfile").read_text()
TARGETS = ("control", "worker-cpu", "worker-cuda")
Instruction = tuple[str, str]


def stages() -> dict[str, list[Instruction]]:
    """Each stage's instructions, those of the stages that it builds on first."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in re.sub(r"\\\n\s*", "", TEXT).splitlines():
        word, _, rest = line.partition(" ")
        if not word or word.startswith("#"):
            continue
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name] = list(found.get(base, []))
        else:
            current.append((word, rest))
    return found


def installed_by(instruction: Instruction, profile: str) -> Iterator[str]:
    """The pins that a RUN installs by grep from a requirements file."""
    for option, pattern, name in re.findall(r"grep (-E|-vE|-v)? ?'([^']+)' requirements/(\w+)\.txt", instruction[1]):
        if name == profile and "pip install" in instruction[1]:
            for pin in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
                if (re.search(pattern, pin) is None) == ("v" in option):
                    yield pin


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_batons_commands_as_another_user_than_root(target: str) -> None:
    stage = stages()[target]
    assert [rest for word, rest in stage if word == "USER"] == ["10001:10001"]
    assert stage.index(("USER", "10001:10001")) > max(
        at for at, (word, _) in enumerate(stage) if word in {"RUN", "COPY"}
    )
    assert ("ENTRYPOINT", '["baton"]') in stage
    assert any("useradd --uid 10001" in rest for word, rest in stage if word == "RUN")
    security = next(each for each in rendered("cpu-demo") if each["kind"] == "Deployment")["spec"]["template"]["spec"]
    assert security["securityContext"]["runAsUser"] == 10001


def test_the_control_image_has_the_light_profile_alone() -> None:
    installs = [rest for word, rest in stages()["control"] if "pip install" in rest]
    assert installs == [
        "pip install --no-deps -r requirements/scheduler.txt",
        "pip install --no-deps /wheels/*.whl",
    ]


@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_a_worker_image_has_every_pin_of_its_profile_once(profile: str) -> None:
    pins = [pin for each in stages()[f"worker-{profile}"] for pin in installed_by(each, profile)]
    assert sorted(pins) == sorted((ROOT / "requirements" / f"{profile}.txt").read_text().split("\n")[:-1])


def test_cudas_libraries_are_a_layer_of_their_own_before_torch_and_baton() -> None:
    layers = [each for each in stages()["worker-cuda"] if "pip install" in each[1]]
    cuda = list(installed_by(layers[0], "cuda"))
    assert any(pin.startswith("nvidia-cublas") for pin in cuda)
    assert all(pin.startswith(("nvidia-", "cuda-")) for pin in cuda)
    assert all(pin.startswith(("torch==", "triton==")) for pin in installed_by(layers[1], "cuda"))
    assert layers[-1] == ("RUN", "pip install --no-deps /wheels/*.whl")


def test_every_install_is_of_exact_pins_with_nothing_resolved_beside_them() -> None:
    assert all("--no-deps" in each for each in re.findall(r"pip (?:install|wheel) [^&\n]*", TEXT))


def test_the_build_sees_every_package_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    needed = {*PACKAGES, "baton_llm.py", "pyproject.toml", "README.md", "LICENSE", "requirements"}
    assert {line[1:] for line in lines if line[0] == "!"} == needed


def test_the_chart_asks_for_images_that_the_file_makes() -> None:
    named = set(re.findall(r"--target (\S+) .*?-t (\S+)", TEXT))
    images = {
        container["image"]
        for example in ("cpu-demo", "xpyd-h100")
        for each in rendered(example)
        if each["kind"] in {"Deployment", "StatefulSet"}
        for container in each["spec"]["template"]["spec"]["containers"]
    }
    assert images == {image for _, image in named}
    assert {target for target, _ in named} == set(TARGETS)


def test_what_probes_and_scripts_call_is_in_the_image() -> None:
    for target in ("worker-cpu", "worker-cuda"):
        assert any("apt-get install" in rest and " curl " in rest for _, rest in stages()[target])
