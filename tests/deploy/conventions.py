"""What must hold of every rendered object beyond its schema (docs/kubernetes.md). Pure: objects in, sentences out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.deploy.helm import Object

WORKLOADS = ("Deployment", "StatefulSet", "LeaderWorkerSet", "Job")
# What every pod must have besides its process's time to drain.
GRACE_BEYOND_DRAIN_S = 30

# Choices and bounds that the API server knows and Kubernetes' published schemas do not have.
CHOICES = {
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "podManagementPolicy": ("OrderedReady", "Parallel"),
    "unhealthyPodEvictionPolicy": ("AlwaysAllow", "IfHealthyBudget"),
    "whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway"),
}
BOUNDS = {
    "containerPort": range(1, 65536),
    "failureThreshold": range(1, 1 << 31),
    "periodSeconds": range(1, 1 << 31),
    "timeoutSeconds": range(1, 1 << 31),
}


def pods(each: Object) -> list[Object]:
    """The pod templates of a workload."""
    match each["kind"]:
        case "Deployment" | "StatefulSet" | "Job":
            return [each["spec"]["template"]]
        case "LeaderWorkerSet":
            templates = each["spec"]["leaderWorkerTemplate"]
            return [templates["leaderTemplate"], templates["workerTemplate"]]
        case _:
            return []


def workloads(objects: Sequence[Object]) -> list[Object]:
    """The objects that make pods."""
    return [each for each in objects if each["kind"] in WORKLOADS]


def broken(objects: Sequence[Object]) -> list[str]:
    """Every broken convention, as a sentence that names its object."""
    found: list[str] = []
    for each in objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        for pod in pods(each):
            found += [f"{name}: {what}" for what in (*_pod(pod, objects), *_security(pod))]
        # The further pods of a group serve nothing.
        for pod in pods(each)[:1]:
            found += [f"{name}: {what}" for what in _probes(each["kind"], pod)]
        found += [f"{name}: {what}" for what in (*_object(each, objects), *_values(each))]
    found += _disruptions(objects)
    return found


def _matches(selector: Object, labels: Object) -> bool:
    return selector.items() <= labels.items()


def _object(each: Object, objects: Sequence[Object]) -> Iterator[str]:
    labels = [pod["metadata"]["labels"] for one in workloads(objects) for pod in pods(one)]
    spec = each.get("spec", {})
    match each["kind"]:
        case "Deployment" | "StatefulSet":
            if not _matches(spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]):
                yield "its selector is not of its pods' labels"
        case "Service":
            selected = [pod for one in workloads(objects) for pod in pods(one)]
            selected = [pod for pod in selected if _matches(spec["selector"], pod["metadata"]["labels"])]
            if not selected:
                yield "it selects no pod"
            ports = {port["name"] for pod in selected for one in pod["spec"]["containers"] for port in one["ports"]}
            for port in spec["ports"]:
                if port.get("targetPort", port["name"]) not in ports:
                    yield f"no pod has its port {port['name']}"
        case "NetworkPolicy":
            if not any(_matches(spec["podSelector"]["matchLabels"], each) for each in labels):
                yield "it selects no pod"
        case "ScaledObject":
            target = spec["scaleTargetRef"]
            found = [
                one
                for one in objects
                if (one["kind"], one["metadata"]["name"], one["apiVersion"])
                == (target["kind"], target["name"], target["apiVersion"])
            ]
            if not found:
                yield "there is no object that it scales"
            if any("replicas" in one["spec"] for one in found):
                yield "what it scales has replicas, so the next helm upgrade is a conflict"
        case "InferencePool":
            if "port" not in spec["endpointPickerRef"]:
                yield "its picker has no port"
        case _:
            pass


def _values(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            allowed = CHOICES.get(key) or BOUNDS.get(key)
            if allowed is not None and value not in allowed:
                yield f"{key} is {value}, not one of {allowed}"
    if isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _values(inner)


def _disruptions(objects: Sequence[Object]) -> Iterator[str]:
    budgets = [each for each in objects if each["kind"] == "PodDisruptionBudget"]
    for budget in budgets:
        if len(budget["spec"].keys() & {"minAvailable", "maxUnavailable"}) != 1:
            yield f"PodDisruptionBudget/{budget['metadata']['name']}: minAvailable and maxUnavailable are not one"
    for each in workloads(objects):
        if each["kind"] == "Job":
            continue
        for pod in pods(each):
            labels = pod["metadata"]["labels"]
            own = [one for one in budgets if _matches(one["spec"]["selector"]["matchLabels"], labels)]
            if len(own) != 1:
                yield f"{each['kind']}/{each['metadata']['name']}: {len(own)} budgets for its pods"


def _pod(pod: Object, objects: Sequence[Object]) -> Iterator[str]:
    spec = pod["spec"]
    volumes = {each["name"]: each for each in spec.get("volumes", [])}
    maps = {each["metadata"]["name"] for each in objects if each["kind"] == "ConfigMap"}
    accounts = {each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"}
    for container in spec["containers"]:
        mounted = {each["name"] for each in container.get("volumeMounts", [])}
        for name in sorted(mounted ^ volumes.keys()):
            yield f"volume {name} is mounted or declared, not both"
    for volume in volumes.values():
        if "configMap" in volume and volume["configMap"]["name"] not in maps:
            yield f"there is no ConfigMap {volume['configMap']['name']}"
    if spec["serviceAccountName"] not in accounts:
        yield f"there is no ServiceAccount {spec['serviceAccountName']}"
    if spec.get("enableServiceLinks") is not False:
        yield "service links are on"


def _security(pod: Object) -> Iterator[str]:
    """Pod Security "restricted", but for what RDMA needs; and no token for what does not ask the API server."""
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "it may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "it has no seccomp profile"
    yield from (f"{name} is set" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
    yield from (f"volume {each['name']} is a hostPath" for each in spec.get("volumes", []) if "hostPath" in each)
    component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
    if component in ("worker", "front-proxy") and spec.get("automountServiceAccountToken") is not False:
        yield "it has a token that it does not need"
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        with_rdma = any("rdma" in name or "efa" in name for name in container["resources"].get("limits", {}))
        if own.get("privileged"):
            if not with_rdma:
                yield "it is privileged"
            continue
        added = own.get("capabilities", {}).get("add", [])
        if own.get("capabilities", {}).get("drop") != ["ALL"] or added != (["IPC_LOCK"] if with_rdma else []):
            yield f"its capabilities are {own.get('capabilities')}"
        if own.get("allowPrivilegeEscalation") is not False or not own.get("readOnlyRootFilesystem"):
            yield "it may gain rights, or write to its root file system"


def _probes(kind: str, pod: Object) -> Iterator[str]:
    """Of everything that serves."""
    container = pod["spec"]["containers"][0]
    if kind == "Job":
        return
    ports = {each["name"] for each in container["ports"]}
    for name, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        probe = container.get(name, {})
        if "exec" in probe:
            asked = [word for word in probe["exec"]["command"] if word.startswith("http")]
            if len(asked) != 2 or not all(word.endswith(path) for word in asked):
                yield f"{name} asks {asked}"
        elif probe.get("httpGet", {}).get("path") != path or probe["httpGet"]["port"] not in ports:
            yield f"{name} is {probe}"
        if probe and probe["timeoutSeconds"] < 5:
            yield f"{name} waits for less than 5 s"
