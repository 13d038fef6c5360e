"""Strict schemas: Kubernetes' own of three versions, and other projects' where their CRDs are at hand."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.deploy.helm import ROOT, Object

VERSIONS = ("1.31", "1.34", "1.37")
"""The oldest that is supported here, one between, the newest."""
# Evidence beside the repository; the project does not depend on it.
CRDS = Path(os.environ.get("BATON_TEST_CRDS", ROOT.parent / "shared" / "crds"))
CUSTOM_GROUPS = (
    "cert-manager.io",
    "gateway.networking.k8s.io",
    "inference.networking.k8s.io",
    "karpenter.k8s.aws",
    "karpenter.sh",
    "keda.sh",
    "leaderworkerset.x-k8s.io",
    "monitoring.coreos.com",
)

Key = tuple[str, str]


def key_of(each: Object) -> Key:
    """apiVersion and kind."""
    return each.get("apiVersion", ""), each.get("kind", "")


def _closed(node: Any) -> Any:
    """A structural schema under which an unknown field is an error; the API server would drop it without a word."""
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    out = {name: _closed(value) for name, value in node.items() if not name.startswith("x-") and name != "format"}
    if node.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    is_object = isinstance(node.get("properties"), dict) and node.get("type", "object") == "object"
    if is_object and not node.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    if node.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    return out


@functools.cache
def custom_kinds() -> dict[Key, Any]:
    """A validator for each custom kind whose CRD is at hand."""
    found: dict[Key, Any] = {}
    for path in sorted(CRDS.glob("*.yaml")):
        for crd in yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            for version in crd["spec"]["versions"]:
                schema = _closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                key = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
                found[key] = jsonschema.Draft202012Validator(schema)
    return found


def problems(each: Object) -> tuple[str, ...]:
    """What the schemas have against one object. A custom kind without a CRD at hand is not looked at."""
    return _problems(json.dumps(each, sort_keys=True))


@functools.cache
def _problems(text: str) -> tuple[str, ...]:
    """Of an object as text: most are the same in all examples, and a schema takes its time."""
    return tuple(_checked(json.loads(text)))


def _checked(each: Object) -> Iterator[str]:
    key = key_of(each)
    name = f"{key[1]}/{each.get('metadata', {}).get('name')}"
    if validator := custom_kinds().get(key):
        for error in validator.iter_errors(each):
            yield f"{name}: {'/'.join(map(str, error.absolute_path))}: {error.message[:160]}"
        return
    if key[0].partition("/")[0] in CUSTOM_GROUPS:
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{name}: Kubernetes {version} has no {key}"
        except kubernetes_validate.ValidationError as error:
            yield f"{name} ({version}): {'/'.join(map(str, error.path))}: {str(error.message)[:160]}"
