"""Alerts, dashboards and scaling ask for metrics and labels that docs/metrics.md promises, so none of them is dead."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from runtime.buckets import TIME_TO_FIRST_TOKEN_S
from tests.deploy.helm import CHART, ROOT, example_names, rendered, template
from tests.deploy.queries import FOREIGN, TARGET_LABELS, documented, labels_of, objections
from tests.deploy.test_examples import loaded_of, processes

RULES = yaml.safe_load((CHART / "rules.yaml").read_text())["groups"][0]["rules"]
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
PROGRAM_TIMEOUT_S = 60


def recorded() -> dict[str, set[str]]:
    """The series that rules make, with their labels."""
    series: dict[str, set[str]] = {}
    for rule in RULES:
        if "record" in rule:
            series[rule["record"]] = labels_of(promql_parser.parse(rule["expr"]), {**documented(), **FOREIGN})
    return series


def panels(path: Path) -> Iterator[dict[str, Any]]:
    yield from (each for each in json.loads(path.read_text())["panels"] if each["type"] != "row")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_there_is(rule: dict[str, Any]) -> None:
    assert list(objections(rule["expr"], recorded())) == []
    named = set(re.findall(r"\$labels\.(\w+)", str(rule.get("annotations"))))
    assert named <= labels_of(promql_parser.parse(rule["expr"]), {**documented(), **FOREIGN, **recorded()})
    assert rule.get("labels", {}).get("severity", "page") in {"page", "ticket"}


def test_the_bound_of_the_objective_is_a_bucket() -> None:
    bounds = {float(each) for rule in RULES for each in re.findall(r'le="([\d.]+)"', rule["expr"])}
    assert bounds
    assert bounds <= set(TIME_TO_FIRST_TOKEN_S)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_asks_for_what_there_is(path: Path) -> None:
    found = {
        f"{panel['title']}: {what}"
        for panel in panels(path)
        for target in panel["targets"]
        for what in objections(target["expr"], {})
    }
    assert found == set()
    for panel in panels(path):
        given = set().union(
            *(
                labels_of(promql_parser.parse(each["expr"].replace("$__rate_interval", "5m")), documented())
                for each in panel["targets"]
            )
        )
        legends = {name for each in panel["targets"] for name in re.findall(r"\{\{(\w+)\}\}", each["legendFormat"])}
        assert legends <= given, panel["title"]


def test_the_dashboards_are_what_their_program_makes() -> None:
    program = (
        "import sys; sys.path.insert(0, 'deploy/dashboards'); import build, json;"
        "print(json.dumps({each.name: each.json() for each in build.DASHBOARDS}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=PROGRAM_TIMEOUT_S
    )
    made = json.loads(ran.stdout)
    assert sorted(made) == ["pools", "time", "trouble", "users"]
    assert made == {path.stem: path.read_text() for path in DASHBOARDS}, "run make chart"


@pytest.mark.parametrize("example", example_names())
def test_scaling_asks_for_what_there_is(example: str) -> None:
    for each in rendered(example):
        if each["kind"] == "ScaledObject":
            asked = [trigger["metadata"]["query"] for trigger in each["spec"]["triggers"]]
            assert [what for query in asked for what in objections(query, {})] == []
            assert all('release="demo"' in query for query in asked)


def test_pools_that_go_to_idle_go_and_come_by_the_scheduler_word_alone() -> None:
    scaled = {
        each["metadata"]["name"]: each["spec"] for each in rendered("scale-to-idle") if each["kind"] == "ScaledObject"
    }
    assert sorted(scaled) == ["demo-decode", "demo-prefill"]
    for name, spec in scaled.items():
        assert spec["minReplicaCount"] == 0
        (trigger,) = spec["triggers"]
        assert f'pool=~"{name.removeprefix("demo-")}"' in trigger["metadata"]["query"]
        # No answer is no zero.
        assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_the_scheduler_counts_for_keda_with_the_bounds_of_the_pools(tmp_path: Path) -> None:
    objects = rendered("scale-to-idle")
    for pod, role in processes(objects):
        if role in {"scheduler", "front_proxy"}:
            scaling = loaded_of(pod, objects, tmp_path).value.scheduler.scaling
            assert (scaling.actuator, scaling.idle_s, scaling.wakes) == ("keda", 600.0, True)
            assert (scaling.prefill_min, scaling.decode_min) == (1, 1)


def test_the_labels_that_queries_rely_on_are_made_by_the_pod_monitor() -> None:
    monitor = next(each for each in rendered("xpyd-h100") if each["kind"] == "PodMonitor")
    made = [{one["targetLabel"] for one in each["relabelings"]} for each in monitor["spec"]["podMetricsEndpoints"]]
    assert made == [{"release", "pool"}] * len(made)
    assert {"release", "pool"} < TARGET_LABELS


def test_the_chart_carries_the_rules_and_the_dashboards() -> None:
    example = CHART.parent / "examples" / "xpyd-h100.yaml"
    objects = template(example)
    rule = next(each for each in objects if each["kind"] == "PrometheusRule")
    assert rule["spec"]["groups"][0]["rules"] == RULES
    carried = {name: text for each in objects if each["kind"] == "ConfigMap" for name, text in each["data"].items()}
    assert {path.name: path.read_text() for path in DASHBOARDS}.items() <= carried.items()


@pytest.mark.parametrize("query", ["sum(rate(baton_worker_gone[5m]))", "sum by (tenant) (baton_scheduler_leads)"])
def test_a_dead_query_is_seen(query: str) -> None:
    assert len(list(objections(query, {}))) == 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here; Debian's package prometheus has it")
def test_alerts_sound_when_they_should(tmp_path: Path) -> None:
    for path in (CHART / "rules.yaml", ROOT / "tests" / "deploy" / "rules_test.yaml"):
        shutil.copy(path, tmp_path)
    for words in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        ran = subprocess.run(
            ["promtool", *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PROGRAM_TIMEOUT_S
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
