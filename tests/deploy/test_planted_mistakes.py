"""Mistakes as people make them, planted into rendered objects: a schema or a convention of ours refuses each."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

from tests.deploy.conventions import broken, pods
from tests.deploy.helm import Object, rendered
from tests.deploy.schemas import CRDS, custom_kinds, key_of, problems

Objects = list[Object]


def find(objects: Objects, kind: str, name: str) -> Object:
    return next(each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name))


def pod_of(objects: Objects) -> Object:
    return pods(find(objects, "Deployment", "demo-decode"))[0]["spec"]


def container_of(objects: Objects) -> Object:
    return pod_of(objects)["containers"][0]


def budget_of(objects: Objects) -> Object:
    return find(objects, "PodDisruptionBudget", "demo-decode")["spec"]


def rename(where: Object, before: str, after: str) -> None:
    where[after] = where.pop(before)


def test_what_was_planted_in_is_well() -> None:
    for example in ("xpyd-h100", "moe-groups"):
        assert broken(rendered(example)) == []
        assert [line for each in rendered(example) for line in problems(each)] == []


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda all_: rename(container_of(all_), "readinessProbe", "readynessProbe"), "readynessProbe"),
        (lambda all_: rename(pod_of(all_), "terminationGracePeriodSeconds", "gracePeriodSeconds"), "gracePeriodSec"),
        (lambda all_: rename(budget_of(all_), "maxUnavailable", "maxUnavailible"), "maxUnavailible"),
        (lambda all_: container_of(all_).update(ports=[{"containerPort": "7100"}]), "not of type 'integer'"),
        (lambda all_: pod_of(all_).update(automountServiceAccountToken="no"), "not of type 'boolean'"),
        (lambda all_: container_of(all_)["livenessProbe"].update(periodSeconds="10"), "not of type 'integer'"),
        (lambda all_: container_of(all_).update(env={"A": "b"}), "not of type 'array'"),
        (lambda all_: container_of(all_)["readinessProbe"]["httpGet"].pop("port"), "'port' is a required property"),
    ],
)
def test_the_schemas_of_kubernetes_see_it(plant: Callable[[Objects], None], said: str) -> None:
    objects = copy.deepcopy(list(rendered("xpyd-h100")))
    plant(objects)
    assert any(said in line for each in objects for line in problems(each))


@pytest.mark.parametrize(
    ("kind", "plant", "said"),
    [
        ("ScaledObject", lambda spec: rename(spec, "maxReplicaCount", "maxReplicas"), "'maxReplicas' was unexpected"),
        ("ScaledObject", lambda spec: spec.pop("triggers"), "'triggers' is a required property"),
        ("ScaledObject", lambda spec: spec["fallback"].update(behavior="static2"), "is not one of"),
        ("LeaderWorkerSet", lambda spec: spec.update(startupPolicy="Leader"), "is not one of"),
        ("LeaderWorkerSet", lambda spec: spec["leaderWorkerTemplate"].update(size="2"), "not of type 'integer'"),
        ("PodMonitor", lambda spec: spec["podMetricsEndpoints"][0].update(interval=15), "not of type 'string'"),
        ("HTTPRoute", lambda spec: spec["rules"][0]["backendRefs"][0].update(port=70000), "greater than the maximum"),
        ("HTTPRoute", lambda spec: spec["rules"][0]["timeouts"].update(request="0"), "does not match"),
    ],
)
def test_the_schemas_of_other_projects_see_it(kind: str, plant: Callable[[Object], None], said: str) -> None:
    if not custom_kinds():
        pytest.skip(f"{CRDS} is not here: kinds of other projects are not checked")
    every = [each for example in ("xpyd-h100", "moe-groups") for each in rendered(example)]
    planted = copy.deepcopy(next(each for each in every if key_of(each)[1] == kind))
    plant(planted["spec"])
    assert any(said in line for line in problems(planted))


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda all_: budget_of(all_).update(minAvailable=1), "minAvailable and maxUnavailable are not one"),
        (
            lambda all_: find(all_, "Deployment", "demo-decode")["spec"]["selector"]["matchLabels"].update(
                {"baton/pool": "prefill"}
            ),
            "its selector is not of its pods' labels",
        ),
        (lambda all_: budget_of(all_)["selector"]["matchLabels"].update({"baton/pool": "x"}), "0 budgets for its pods"),
        (lambda all_: pod_of(all_)["volumes"].pop(), "volume kv is mounted or declared, not both"),
        (
            lambda all_: find(all_, "Service", "demo")["spec"]["ports"][0].update(targetPort="https"),
            "no pod has its port",
        ),
        (
            lambda all_: find(all_, "Service", "demo")["spec"]["selector"].update({"app": "baton"}),
            "it selects no pod",
        ),
        (lambda all_: container_of(all_)["livenessProbe"]["httpGet"].update(path="/health"), "livenessProbe is"),
        (lambda all_: container_of(all_)["startupProbe"].update(timeoutSeconds=1), "waits for less than 5 s"),
        (
            lambda all_: find(all_, "Deployment", "demo-decode")["spec"].update(replicas=2),
            "what it scales has replicas",
        ),
        (
            lambda all_: find(all_, "ScaledObject", "demo-decode")["spec"]["scaleTargetRef"].update(name="decode"),
            "there is no object that it scales",
        ),
        (
            lambda all_: container_of(all_).update(imagePullPolicy="Sometimes"),
            "imagePullPolicy is Sometimes, not one of",
        ),
        (lambda all_: container_of(all_)["ports"][0].update(containerPort=71000), "containerPort is 71000, not one of"),
        (lambda all_: pod_of(all_)["securityContext"].update(runAsNonRoot=False), "it may run as root"),
        (lambda all_: pod_of(all_).update(hostIPC=True), "hostIPC is set"),
        (
            lambda all_: container_of(all_)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
            "its capabilities are",
        ),
        (lambda all_: pod_of(all_).pop("enableServiceLinks"), "service links are on"),
        (lambda all_: pod_of(all_).pop("automountServiceAccountToken"), "it has a token that it does not need"),
    ],
)
def test_our_own_conventions_see_it(plant: Callable[[Objects], None], said: str) -> None:
    objects = copy.deepcopy(list(rendered("xpyd-h100")))
    plant(objects)
    assert any(said in line for line in broken(objects))


def test_an_inference_pool_without_the_port_of_its_picker_is_seen() -> None:
    """The API server sees it by a CEL rule, which no schema check runs."""
    planted = {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": "demo"},
        "spec": {"endpointPickerRef": {"name": "picker"}},
    }
    assert broken([planted]) == ["InferencePool/demo: its picker has no port"]
