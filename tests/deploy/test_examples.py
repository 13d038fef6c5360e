"""Every example of the chart: what Helm, Kubernetes' schemas, our conventions and Baton's own loader say of it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import httpx
import pytest
import yaml

from cli.app import app
from engine import preflight
from launcher.config import BatonConfig, drain_s
from runtime.configuration import Loaded, load
from runtime.process.telemetry import Health, serve_metrics
from tests.deploy.conventions import GRACE_BEYOND_DRAIN_S, broken, pods, workloads
from tests.deploy.helm import CHART, EXAMPLES, RELEASE, ROOT, Object, example_names, rendered, run, template
from tests.deploy.schemas import CRDS, CUSTOM_GROUPS, custom_kinds, key_of, problems

ROLES = {"scheduler": "scheduler", "front-proxy": "front_proxy", "worker": "decode"}
POD_FIELDS = {
    "metadata.name": "demo-decode-0",
    "status.podIP": "10.0.0.7",
    "spec.nodeName": "node-1",
}

GOLDEN = Path(__file__).parent / "golden"

every_example = pytest.mark.parametrize("example", example_names())


def test_there_are_six_examples() -> None:
    assert example_names() == ["cpu-demo", "efa", "moe-groups", "one-gpu-node", "scale-to-idle", "xpyd-h100"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_helm_lints_it(path: Path) -> None:
    ran = run("lint", "--strict", CHART, "--values", path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@every_example
def test_it_fits_the_schemas_of_three_versions_of_kubernetes(example: str) -> None:
    assert [line for each in rendered(example) for line in problems(each)] == []


def test_other_projects_kinds_fit_their_own_schemas() -> None:
    """That each is looked at at all; what the schemas say, the test above tells."""
    if not custom_kinds():
        pytest.skip(f"{CRDS} is not here: kinds of other projects are not checked")
    seen = {key_of(each) for example in example_names() for each in rendered(example)}
    custom = {key for key in seen if key[0].partition("/")[0] in CUSTOM_GROUPS}
    # Not among the CRDs.
    assert {key for key in custom - custom_kinds().keys() if key[0] != "cert-manager.io/v1"} == set()
    assert {kind for _, kind in custom} >= {"LeaderWorkerSet", "ScaledObject", "PodMonitor", "HTTPRoute"}


@every_example
def test_it_keeps_the_conventions(example: str) -> None:
    assert broken(rendered(example)) == []


@every_example
def test_names_are_unique_and_short_enough_for_a_label(example: str) -> None:
    keys = [(each["kind"], each["metadata"]["name"]) for each in rendered(example)]
    assert len(keys) == len(set(keys))
    assert [name for _, name in keys if len(name) > 63] == []


def environ_of(container: Object) -> dict[str, str]:
    """The container's environment as the kubelet would make it."""
    environ: dict[str, str] = {}
    for each in container["env"]:
        if "valueFrom" in each:
            field = each["valueFrom"].get("fieldRef", {}).get("fieldPath", "")
            environ[each["name"]] = POD_FIELDS.get(field, "")
        else:
            environ[each["name"]] = re.sub(r"\$\((\w+)\)", lambda found: environ[found[1]], each["value"])
    return environ


def data_of(pod: Object, objects: tuple[Object, ...]) -> dict[str, str]:
    """The files that are mounted at /etc/baton."""
    name = next(each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each)
    data: dict[str, str] = next(
        each["data"] for each in objects if (each["kind"], each["metadata"]["name"]) == ("ConfigMap", name)
    )
    return data


def loaded_of(pod: Object, objects: tuple[Object, ...], folder: Path) -> Loaded[BatonConfig]:
    """The settings of the process in ``pod``, through Baton's own loader."""
    file = folder / "config.json"
    file.write_text(data_of(pod, objects)["config.json"])
    return load(BatonConfig, file=file, environ=environ_of(pod["spec"]["containers"][0]), sets=())


def processes(objects: tuple[Object, ...]) -> list[tuple[Object, str]]:
    """Each pod that runs a process of Baton, with the role of that process."""
    every = [pod for each in workloads(objects) for pod in pods(each)]
    components = [(pod, pod["metadata"]["labels"]["app.kubernetes.io/component"]) for pod in every]
    return [(pod, ROLES[component]) for pod, component in components if component in ROLES]


@every_example
def test_batons_own_loader_takes_every_configuration(example: str, tmp_path: Path) -> None:
    objects = rendered(example)
    assert len(processes(objects)) >= 3
    for pod, role in processes(objects):
        config = loaded_of(pod, objects, tmp_path).value
        # Front proxies run on CPU, whatever workers run on.
        assert preflight.objection(config.engine, {"VLLM_TARGET_DEVICE": "cpu"}) is None
        container = pod["spec"]["containers"][0]
        if "ports" not in container:
            assert "group.sh" in str(container["command"]), "only the further ranks of an engine serve nothing"
            continue
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        section = config.of_role(role)  # type: ignore[arg-type] # a role
        assert ports["metrics"] == section.metrics_port
        assert ports["grpc"] == (config.front_proxy.grpc_port if role == "front_proxy" else section.port)
        assert ports.get("http", 8000) == config.front_proxy.port
        assert section.host == "0.0.0.0"
        grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace_s >= drain_s(role, config) + GRACE_BEYOND_DRAIN_S  # type: ignore[arg-type]


@every_example
def test_every_process_finds_the_scheduler_and_has_a_name(example: str, tmp_path: Path) -> None:
    objects = rendered(example)
    stateful = next(each for each in objects if each["kind"] == "StatefulSet")
    service = stateful["spec"]["serviceName"]
    addresses = [f"{service}-{index}.{service}:7000" for index in range(stateful["spec"]["replicas"])]
    for pod, role in processes(objects):
        config = loaded_of(pod, objects, tmp_path).value
        if role == "scheduler":
            assert config.scheduler.scheduler_id == POD_FIELDS["metadata.name"]
            assert config.scheduler.kubernetes.lease_name == service
            assert not config.scheduler.alone
        elif role == "front_proxy":
            assert config.front_proxy.scheduler_address.split(",") == addresses
        else:
            assert config.worker.scheduler_address.split(",") == addresses
            assert config.worker.worker_id == POD_FIELDS["metadata.name"]
            assert config.worker.advertise_host == POD_FIELDS["status.podIP"]
            assert config.worker.topology == POD_FIELDS["spec.nodeName"]


@every_example
def test_every_command_is_one_of_batons(example: str) -> None:
    objects = rendered(example)
    for pod, _ in processes(objects):
        container = pod["spec"]["containers"][0]
        if "command" in container:
            script = container["command"][1].removeprefix("/etc/baton/")
            assert container["command"][0] == "/bin/bash"
            assert script in data_of(pod, objects)
        else:
            _, bound, _ = app.parse_args(container["args"], print_error=False, exit_on_error=False)
            assert str(bound.arguments["sources"].config) == "/etc/baton/config.json"


async def test_every_path_that_a_probe_asks_for_is_served() -> None:
    probes = [
        str(pod["spec"]["containers"][0].get(name, {}))
        for example in example_names()
        for pod, _ in processes(rendered(example))
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    ]
    paths = {path for probe in probes for path in re.findall(r"(?:'path': '|:910[01])(/\w+)", probe)}
    assert len(paths) == 2
    address = serve_metrics("127.0.0.1", 0, Health())
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
        answers = {path: (await client.get(path)).status_code for path in (*paths, "/health")}
    assert answers == {"/livez": 200, "/readyz": 503, "/health": 404}


@every_example
def test_an_autoscaled_pool_says_no_replicas_and_another_does(example: str) -> None:
    objects = rendered(example)
    scaled = {each["metadata"]["name"] for each in objects if each["kind"] == "ScaledObject"}
    pools = [each for each in workloads(objects) if "baton/pool" in each["metadata"]["labels"]]
    assert pools
    assert {each["metadata"]["name"]: "replicas" not in each["spec"] for each in pools} == {
        each["metadata"]["name"]: each["metadata"]["name"] in scaled for each in pools
    }


def test_only_what_a_pool_reads_starts_it_again() -> None:
    def checksums(values: str) -> dict[str, str]:
        objects = template(CHART.parent / "examples" / "cpu-demo.yaml", values=values)
        return {
            each["metadata"]["name"]: pods(each)[0]["metadata"]["annotations"]["baton/config"]
            for each in workloads(objects)
        }

    def changed(values: str) -> list[str]:
        before, after = checksums(""), checksums(values)
        return sorted(name for name in before if before[name] != after[name])

    assert changed("config: {front_proxy: {deadline_s: 30}}") == ["demo-front-proxy"]
    assert changed("pools: {decode: {config: {worker: {requests_max: 9}}}}") == ["demo-decode"]
    assert changed("config: {prefill_worker: {lease_s: 60}}") == ["demo-decode", "demo-prefill"]
    assert changed("config: {scheduler: {prefill_wait_max_s: 2}}") == ["demo-front-proxy", "demo-scheduler"]


def test_a_new_version_of_the_chart_alone_starts_nothing_again(tmp_path: Path) -> None:
    later = shutil.copytree(CHART, tmp_path / "baton")
    about = (later / "Chart.yaml").read_text()
    (later / "Chart.yaml").write_text(re.sub(r"(?m)^(version|appVersion): .*", r"\1: 9.9.9", about))
    ran = run("template", RELEASE, later, "--values", CHART.parent / "examples" / "moe-groups.yaml")
    after = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(ran.stdout) if each}
    before = by_name(rendered("moe-groups"))
    assert before["Service", "demo"] != after["Service", "demo"]
    every = [key for key in before if pods(before[key])]
    assert len(every) == 4
    assert [key for key in every if pods(before[key]) != pods(after[key])] == []


def test_each_pod_may_have_nodes_and_variables_of_its_own() -> None:
    own = "nodeSelector: {disk: 'on'}, tolerations: [{key: a, operator: Exists}], env: {HTTPS_PROXY: 'x: y'}"
    pools = f"pools: {{prefill: {{{own}}}, decode: {{{own}}}}}"
    values = f"""{{model: {{s3: {{uri: 's3://bucket', {own}}}}}, scheduler: {{{own}}}, frontProxy: {{{own}}},
        operator: {{{own}}}, image: {{pullSecrets: ['123']}}, scaling: {{actuator: operator}}, {pools}}}"""
    objects = template(CHART.parent / "examples" / "scale-to-idle.yaml", values=values)
    assert [line for each in objects for line in (*problems(each), *broken(objects))] == []
    every = [pod["spec"] for each in workloads(objects) for pod in pods(each)]
    assert len(every) == 6
    for spec in every:
        assert spec["nodeSelector"]["disk"] == "on"
        assert {"key": "a", "operator": "Exists"} in spec["tolerations"]
        assert {"name": "HTTPS_PROXY", "value": "x: y"} in spec["containers"][0]["env"]
        assert spec["imagePullSecrets"] == [{"name": "123"}]


def test_what_yaml_takes_for_another_type_stays_text() -> None:
    pool = "{role: decode, instanceType: '1', resources: {limits: {memory: 9Gi}}}"
    images = "{worker: 'true', scheduler: 'a: b', frontProxy: 'no'}"
    values = f"{{pools: {{'on': {pool}}}, model: {{claim: '123', tokenSecret: '4'}}, image: {images}}}"
    objects = template(CHART.parent / "examples" / "cpu-demo.yaml", values=values)
    assert [line for each in objects for line in (*problems(each), *broken(objects))] == []
    ran = run("template", "true", CHART, "--values", CHART.parent / "examples" / "xpyd-h100.yaml")
    assert [line for each in yaml.safe_load_all(ran.stdout) for line in problems(each)] == []


def test_prometheus_of_another_release_finds_what_it_looks_for() -> None:
    values = "monitoring: {labels: {release: stack}}"
    objects = template(CHART.parent / "examples" / "xpyd-h100.yaml", values=values)
    for kind in ("PodMonitor", "PrometheusRule"):
        labels = by_name(tuple(objects))[kind, "demo"]["metadata"]["labels"]
        assert (labels["release"], labels["app.kubernetes.io/name"]) == ("stack", "baton")


def test_a_route_leads_through_an_inference_pool_where_one_is_asked_for() -> None:
    values = "gateway: {inferencePool: {enabled: true, picker: '1'}}"
    objects = template(CHART.parent / "examples" / "xpyd-h100.yaml", values=values)
    assert [line for each in objects for line in (*problems(each), *broken(objects))] == []
    named = by_name(tuple(objects))
    assert named["InferencePool", "demo"]["spec"]["endpointPickerRef"]["name"] == "1"
    (rule,) = named["HTTPRoute", "demo"]["spec"]["rules"]
    assert [(each["kind"], each["name"]) for each in rule["backendRefs"]] == [("InferencePool", "demo")]


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "karpenter").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_node_pools_fit_their_schemas_and_give_workers_time_to_drain(path: Path) -> None:
    objects = list(yaml.safe_load_all(path.read_text()))
    assert [each["kind"] for each in objects] == ["NodePool", "EC2NodeClass"]
    assert [line for each in objects for line in problems(each)] == []
    minutes = int(objects[0]["spec"]["template"]["spec"]["terminationGracePeriod"].removesuffix("m"))
    graces_s = [
        pod["spec"]["terminationGracePeriodSeconds"]
        for example in example_names()
        for pod, _ in processes(rendered(example))
    ]
    assert minutes * 60 >= max(graces_s)


@pytest.mark.parametrize("example", ["cpu-demo", "one-gpu-node"])
def test_what_is_rendered_is_what_was_reviewed(example: str) -> None:
    """``BATON_UPDATE_GOLDEN=1`` writes it anew."""
    golden = GOLDEN / f"{example}.yaml"
    rendered_now = by_name(rendered(example))
    if os.environ.get("BATON_UPDATE_GOLDEN") == "1":
        golden.write_text(yaml.safe_dump_all([rendered_now[key] for key in sorted(rendered_now)], width=120))
    assert rendered_now == by_name(tuple(yaml.safe_load_all(golden.read_text())))


def by_name(objects: tuple[Object, ...]) -> dict[tuple[str, str], Object]:
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}
