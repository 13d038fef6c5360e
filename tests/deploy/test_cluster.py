"""The chart on a cluster of yours: BATON_TEST_KUBECONFIG names its kubeconfig. Nothing of it was run without one.

Needs neither images nor nodes but for the last test, which BATON_TEST_IMAGES asks for: ``control,worker-cpu``, names of
images that the nodes can pull. Each test makes a namespace and takes it away.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import helm

KUBECONFIG = os.environ.get("BATON_TEST_KUBECONFIG", "")
IMAGES = os.environ.get("BATON_TEST_IMAGES", "")
EXAMPLE = helm.CHART.parent / "examples" / "cpu-demo.yaml"
ANSWER_TIMEOUT_S = 60
SERVING_TIMEOUT_S = 600

pytestmark = [
    pytest.mark.skipif(not KUBECONFIG, reason="BATON_TEST_KUBECONFIG names no cluster"),
    pytest.mark.timeout(2 * SERVING_TIMEOUT_S),
]
SCALED = ("--set", "scaling.actuator=operator", "--set", "pools.decode.autoscale.min=1,pools.decode.autoscale.max=4")


def ran(program: str, *words: str | Path, timeout_s: float = ANSWER_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """A command against that cluster."""
    environment = {**os.environ, "KUBECONFIG": KUBECONFIG}
    command = [program, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s)


def well(program: str, *words: str | Path, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
    """The output of one that must succeed."""
    done = ran(program, *words, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def namespace() -> Iterator[str]:
    """One of its own, in which pods must keep Pod Security's level "restricted"."""
    name = f"baton-test-{uuid.uuid4().hex[:8]}"
    well("kubectl", "create", "namespace", name)
    well("kubectl", "label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield name
    well("kubectl", "delete", "namespace", name, "--wait=false")


def install(namespace: str, *more: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """`helm install` of the example."""
    words = (helm.RELEASE, helm.CHART, "--namespace", namespace, "--values", EXAMPLE)
    well(helm.helm(), "install", *words, *more, timeout_s=timeout_s)


def shown(namespace: str, kind: str, name: str) -> Any:
    """One object."""
    return json.loads(well("kubectl", "-n", namespace, "get", kind, name, "-o", "json"))


@pytest.mark.parametrize("example", helm.example_names())
def test_the_api_server_takes_each_example(namespace: str, example: str) -> None:
    values = helm.CHART.parent / "examples" / f"{example}.yaml"
    words = ("install", helm.RELEASE, helm.CHART, "--namespace", namespace, "--values", values, "--dry-run=server")
    done = ran(helm.helm(), *words)
    if "no matches for kind" in done.stderr:
        pytest.skip(f"the cluster lacks another project's kind: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def test_pods_keep_the_restricted_level_and_a_second_upgrade_changes_nothing(namespace: str) -> None:
    install(namespace)
    before = shown(namespace, "deployment", f"{helm.RELEASE}-decode")["metadata"]["generation"]
    words = ("upgrade", helm.RELEASE, helm.CHART, "--namespace", namespace, "--values", EXAMPLE)
    well(helm.helm(), *words)
    assert shown(namespace, "deployment", f"{helm.RELEASE}-decode")["metadata"]["generation"] == before
    events = well("kubectl", "-n", namespace, "get", "events", "--field-selector=reason=FailedCreate", "-o", "name")
    assert events == "", "pods were refused"


def test_a_pool_that_scales_keeps_its_size_through_an_upgrade(namespace: str) -> None:
    install(namespace, *SCALED)
    pool = f"{helm.RELEASE}-decode"
    well("kubectl", "-n", namespace, "scale", f"deployment/{pool}", "--replicas=3")
    words = ("upgrade", helm.RELEASE, helm.CHART, "--namespace", namespace, "--values", EXAMPLE)
    well(helm.helm(), *words, *SCALED)
    assert shown(namespace, "deployment", pool)["spec"]["replicas"] == 3


def test_the_operator_may_scale_its_pools_and_nothing_else(namespace: str) -> None:
    install(namespace, *SCALED)
    account = f"system:serviceaccount:{namespace}:{helm.RELEASE}-operator"

    def may(verb: str, what: str, *more: str) -> bool:
        done = ran("kubectl", "-n", namespace, "auth", "can-i", verb, what, *more, f"--as={account}")
        return done.stdout.strip() == "yes"

    pool = f"deployments.apps/{helm.RELEASE}-decode"
    assert may("update", pool, "--subresource=scale")
    assert not may("update", f"deployments.apps/{helm.RELEASE}-front-proxy", "--subresource=scale")
    assert not may("update", pool)
    assert not may("create", "pods")
    assert not may("get", "secrets")


@pytest.mark.skipif(not IMAGES, reason="BATON_TEST_IMAGES names no images")
def test_the_demo_model_serves(namespace: str) -> None:
    control, worker = IMAGES.split(",")
    images = f"image.scheduler={control},image.frontProxy={worker},image.worker={worker}"
    wait = ("--set", images, "--wait", "--timeout", f"{SERVING_TIMEOUT_S}s")
    install(namespace, *wait, timeout_s=SERVING_TIMEOUT_S + ANSWER_TIMEOUT_S)
    body = '{"model": "baton-demo", "prompt": "Baton", "max_tokens": 4}'
    ask = (
        "import urllib.request as u; r = u.Request('http://127.0.0.1:8000/v1/completions',"
        f" {body.encode()!r}, {{'content-type': 'application/json'}}); print(u.urlopen(r).status)"
    )
    proxy = f"deployment/{helm.RELEASE}-front-proxy"
    assert well("kubectl", "-n", namespace, "exec", proxy, "--", "python", "-c", ask).strip() == "200"
