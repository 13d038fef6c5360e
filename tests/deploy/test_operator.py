"""`baton operator` in the chart: its command, its settings, and its rights, which are the fewest that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli.app import app
from launcher.kubernetes import operator
from tests.deploy.conventions import broken, pods
from tests.deploy.helm import CHART, Object, template
from tests.deploy.schemas import problems
from tests.deploy.test_examples import loaded_of


def rendered_with_it(values: str = "") -> tuple[Object, ...]:
    example = CHART.parent / "examples" / "scale-to-idle.yaml"
    return tuple(template(example, values=f"{{scaling: {{actuator: operator}}, {values}}}"))


def find(objects: tuple[Object, ...], kind: str) -> Object:
    return next(each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, "demo-operator"))


def test_it_fits_the_schemas_and_the_conventions_and_stands_in_for_keda() -> None:
    objects = rendered_with_it()
    assert [line for each in objects for line in problems(each)] == []
    assert broken(objects) == []
    assert [each for each in objects if each["kind"] == "ScaledObject"] == []


def test_its_command_names_the_pools_and_the_schedulers(tmp_path: Path) -> None:
    objects = rendered_with_it("pools: {decode: {workload: LeaderWorkerSet}}")
    (pod,) = pods(find(objects, "Deployment"))
    _, bound, _ = app.parse_args(pod["spec"]["containers"][0]["args"], print_error=False, exit_on_error=False)
    given: dict[str, Any] = bound.arguments
    assert given["release"] == "demo"
    assert given["metrics_port"] == 9100
    assert given["scheduler"][1].endswith("demo-scheduler-0.demo-scheduler:7000,demo-scheduler-1.demo-scheduler:7000")
    pools = operator.parse(given["pool"])
    assert {role: (pool.name, pool.kind, pool.replicas_max) for role, pool in pools.items()} == {
        "prefill": ("prefill", "Deployment", 4),
        "decode": ("decode", "LeaderWorkerSet", 8),
    }
    pod["spec"]["containers"][0]["env"] = []
    assert loaded_of(pod, objects, tmp_path).value.scheduler.scaling.actuator == operator.NAME


def test_it_may_change_sizes_and_no_template() -> None:
    rules = find(rendered_with_it("pools: {decode: {workload: LeaderWorkerSet}}"), "Role")["rules"]
    rights = {
        (resource, verb): rule.get("resourceNames")
        for rule in rules
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert rights == {
        ("deployments/scale", "get"): ["demo-prefill"],
        ("deployments/scale", "update"): ["demo-prefill"],
        ("leaderworkersets/scale", "get"): ["demo-decode"],
        ("leaderworkersets/scale", "update"): ["demo-decode"],
        ("pods", "list"): None,
        ("pods", "patch"): None,
        ("leases", "create"): None,
        ("leases", "get"): ["demo-operator"],
        ("leases", "update"): ["demo-operator"],
    }
