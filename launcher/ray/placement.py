"""What each process asks of a Ray cluster, and whether there is room for all of them. Pure: asks Ray nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec

from engine.config import EngineConfig
from launcher.config import BatonConfig, Placement
from runtime.roles import WORKER_ROLES, Role

ACCELERATOR_LABEL = "ray.io/accelerator-type"
ZONE_LABEL = "ray.io/availability-zone"
NODE_LABEL = "ray.io/node-id"
SAME = "same"
# Ray's head node has one of it. Every scheduler asks for a little: its address is to stay, and Ray needs this node.
HEAD = "node:__internal_head__"
_HEAD_SHARE = 0.001


class Node(msgspec.Struct, frozen=True):
    """One living node of a Ray cluster, with all that it has."""

    address: str
    resources: Mapping[str, float] = {}
    labels: Mapping[str, str] = {}


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica of a pool needs. ``setting`` is where an operator says so."""

    setting: str
    replicas: int = 1
    nodes: int = 1
    """Different nodes of one replica, each of which must have the resources."""
    resources: Mapping[str, float] = {}
    labels: Mapping[str, str] = {}
    spread: bool = False
    """Rather on different nodes."""

    def avoiding(self, node_ids: Collection[str]) -> Ask:
        """The same on none of these nodes."""
        if not node_ids or NODE_LABEL in self.labels:
            return self
        others = f"!in({','.join(sorted(node_ids))})"
        return msgspec.structs.replace(self, labels={**self.labels, NODE_LABEL: others})

    def options(self) -> dict[str, Any]:
        """As Ray wants them for an actor."""
        custom = {name: amount for name, amount in self.resources.items() if name not in ("CPU", "GPU", "memory")}
        return {
            "num_cpus": self.resources.get("CPU", 0.0),
            "num_gpus": self.resources.get("GPU", 0.0),
            "memory": self.resources.get("memory") or None,
            "resources": custom or None,
            "label_selector": dict(self.labels) or None,
            "scheduling_strategy": "SPREAD" if self.spread else "DEFAULT",
        }

    def bundles(self) -> dict[str, Any]:
        """As Ray wants them for a placement group."""
        resources = {name: amount for name, amount in self.resources.items() if amount}
        selector = {"bundle_label_selector": [dict(self.labels)] * self.nodes} if self.labels else {}
        return {"bundles": [resources] * self.nodes, "strategy": "STRICT_SPREAD", **selector}

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for name, amount in sorted(self.resources.items())]
        parts += [f"{name}={value}" for name, value in sorted(self.labels.items())]
        each = ", ".join(parts) or "nothing"
        return each if self.nodes == 1 else f"{self.nodes} nodes, each with {each}"


def asks(config: BatonConfig, nodes: Sequence[Node], near: str = "") -> tuple[dict[Role, Ask], str]:
    """What the processes of each role ask for, and the zone or node that those get who want the same one.

    That is ``near`` while it has room for them all, or else the first that has. Empty: none is wanted.
    """
    placements = config.launcher.ray.placement.values()
    if any(one.same_node for one in placements):
        label = NODE_LABEL
    elif any(one.zone == SAME for one in placements):
        label = ZONE_LABEL
    else:
        return _asks(config, nodes, {}), ""
    values = sorted({node.labels[label] for node in nodes if label in node.labels}, key=lambda one: (one != near, one))
    candidates = [(_asks(config, nodes, {label: value}), value) for value in values]
    fitting = (each for each in candidates if not lack(nodes, list(each[0].values())))
    # Where none has room, what is said must name one.
    return next(fitting, candidates[0] if candidates else (_asks(config, nodes, {label: "none"}), ""))


def _asks(config: BatonConfig, nodes: Sequence[Node], same: Mapping[str, str]) -> dict[Role, Ask]:
    launcher = config.launcher
    no_gpus = config.engine.kind == "fake" or not any(node.resources.get("GPU") for node in nodes)
    gpus = {role: 0.0 if no_gpus else float(ranks_of(config.engine_of(role))) for role in WORKER_ROLES}

    def ask(role: Literal["prefill", "decode", "front_proxy"], replicas: int, gpus: float) -> Ask:
        placement = launcher.ray.placement.get(role, Placement())
        resources = {
            "CPU": placement.cpus,
            "GPU": gpus / placement.nodes if placement.gpus is None else placement.gpus,
            "memory": float(placement.memory_bytes),
            **placement.custom,
        }
        labels = {
            ACCELERATOR_LABEL: placement.accelerator,
            ZONE_LABEL: same.get(ZONE_LABEL, "") if placement.zone == SAME else placement.zone,
            NODE_LABEL: same.get(NODE_LABEL, "") if placement.same_node else "",
            **placement.labels,
        }
        return Ask(
            setting=f"launcher.ray.placement.{role}",
            replicas=replicas,
            nodes=placement.nodes,
            resources={name: amount for name, amount in resources.items() if amount},
            labels={name: value for name, value in labels.items() if value},
            spread=True,
        )

    return {
        "scheduler": Ask(setting="the scheduler", replicas=launcher.schedulers, resources={HEAD: _HEAD_SHARE}),
        "prefill": ask("prefill", launcher.prefill, gpus["prefill"]),
        "decode": ask("decode", launcher.decode, gpus["decode"]),
        "front_proxy": ask("front_proxy", launcher.front_proxies, 0.0),
    }


def ranks_of(engine: EngineConfig) -> int:
    """The ranks of one engine, each of which has a GPU where there are any."""
    return engine.tensor_parallel_size * engine.data_parallel_size * int(engine.args.get("pipeline_parallel_size", 1))


def objection(config: BatonConfig) -> str:
    """Why an engine cannot be spread over the nodes that it is given, in a sentence; empty: it can."""
    for role, placement in config.launcher.ray.placement.items():
        path = f"launcher.ray.placement.{role}.nodes={placement.nodes}"
        if placement.nodes == 1:
            continue
        if role == "front_proxy" or config.engine.kind == "fake":
            return f"{path}: only the engine of a worker runs on several nodes"
        engine = config.engine_of(role)
        ranks = ranks_of(engine)
        if engine.data_parallel_size > 1:
            return f"{path}: the ranks of engine.data_parallel_size={engine.data_parallel_size} share one node"
        if placement.same_node:
            return f"{path}: not together with same_node"
        if ranks % placement.nodes:
            why = f"the {ranks} ranks of an engine (tensor_parallel_size times pipeline_parallel_size)"
            return f"{path}: {why} cannot be spread evenly"
    return ""


def lack(nodes: Sequence[Node], wanted: Sequence[Ask]) -> str:
    """Which pool finds no room on ``nodes``, in a sentence; empty when all do.

    Those that cannot go everywhere are placed first, then the largest.
    """
    left = [dict(node.resources) for node in nodes]

    def order(ask: Ask) -> tuple[bool, float, float]:
        return not ask.labels, -ask.resources.get("GPU", 0.0), -ask.resources.get("CPU", 0.0)

    for ask in sorted(wanted, key=order):
        placed = sum(_place(ask, nodes, left) for _ in range(ask.replicas))
        if placed < ask.replicas:
            sums = {name: sum(node.resources.get(name, 0.0) for node in nodes) for name in sorted(ask.resources)}
            having = "".join(f", {amount:g} {name}" for name, amount in sums.items())
            return (
                f"{ask.setting} asks for {ask.replicas} times {ask}; "
                f"the Ray cluster (nodes: {len(nodes)}{having}) has room for {placed}"
            )
    return ""


def _place(ask: Ask, nodes: Sequence[Node], left: Sequence[dict[str, float]]) -> bool:
    """Take what one replica asks for from the first nodes that have it."""
    fitting = [
        free
        for node, free in zip(nodes, left, strict=True)
        if all(node.labels.get(name) == value for name, value in ask.labels.items())
        and all(free.get(name, 0.0) >= amount for name, amount in ask.resources.items())
    ][: ask.nodes]
    if len(fitting) < ask.nodes:
        return False
    for free in fitting:
        for name, amount in ask.resources.items():
            free[name] -= amount
    return True
