"""What processes ask of a Ray cluster, and which pool is named when there is no room."""

from __future__ import annotations

import pytest

from launcher.config import BatonConfig
from launcher.ray.placement import ACCELERATOR_LABEL, HEAD, NODE_LABEL, ZONE_LABEL, Ask, Node, asks, lack, objection
from runtime.configuration import load
from runtime.roles import Role

HEAD_NODE = Node("10.0.0.1", {"CPU": 4.0, HEAD: 1.0})


def node(gpus: float = 2.0, zone: str = "a", accelerator: str = "H100") -> Node:
    labels = {ZONE_LABEL: zone, ACCELERATOR_LABEL: accelerator}
    return Node("10.0.0.2", {"CPU": 8.0, "GPU": gpus, "memory": 1e9}, labels)


def configured(*sets: str) -> BatonConfig:
    return load(BatonConfig, file=None, environ={}, sets=["launcher.decode=2", *sets]).value


def asked(nodes: list[Node], *sets: str) -> dict[Role, Ask]:
    return asks(configured(*sets), nodes)[0]


def lacking(nodes: list[Node], *sets: str) -> str:
    return lack(nodes, list(asked(nodes, *sets).values()))


def test_a_worker_asks_for_the_gpus_of_its_engine_where_there_are_any() -> None:
    sets = ("engine.tensor_parallel_size=4", "engine.args.pipeline_parallel_size=2")
    with_gpus = asked([HEAD_NODE, node()], *sets)
    assert with_gpus["decode"].resources == {"CPU": 1.0, "GPU": 8.0}
    assert with_gpus["front_proxy"].resources == {"CPU": 1.0}
    assert with_gpus["scheduler"].options()["resources"] == {HEAD: 0.001}
    assert asked([HEAD_NODE], *sets)["decode"].resources == {"CPU": 1.0}
    assert asked([node()], *sets, "launcher.ray.placement.decode.gpus=0.5")["decode"].resources["GPU"] == 0.5
    fake = asked([node()], *sets, "engine.kind=fake")
    assert fake["decode"].options()["num_gpus"] == 0.0


def test_what_a_pool_asks_for_reaches_ray() -> None:
    placement = ["accelerator=H100", "zone=a", "memory_bytes=1000", 'custom={"efa": 4}', 'labels={"rack": "7"}']
    ask = asked([node()], *(f"launcher.ray.placement.prefill.{one}" for one in placement))["prefill"]
    assert ask.options() == {
        "num_cpus": 1.0,
        "num_gpus": 1.0,
        "memory": 1000.0,
        "resources": {"efa": 4.0},
        "label_selector": {ACCELERATOR_LABEL: "H100", ZONE_LABEL: "a", "rack": "7"},
        "scheduling_strategy": "SPREAD",
    }


@pytest.mark.parametrize(
    ("nodes", "sets", "why"),
    [
        ([HEAD_NODE, node(), node()], [], ""),
        ([HEAD_NODE, node()], [], ("launcher.ray.placement.decode asks for 2 times 1 CPU, 1 GPU; "
            "the Ray cluster (nodes: 2, 12 CPU, 2 GPU) has room for 1")),
        ([node(), node()], [], ("the scheduler asks for 1 times 0.001 node:__internal_head__; "
            "the Ray cluster (nodes: 2, 0 node:__internal_head__) has room for 0")),
        ([HEAD_NODE, node(), node(accelerator="A10G")], ["launcher.ray.placement.prefill.accelerator=H200"],
            ("launcher.ray.placement.prefill asks for 1 times 1 CPU, 1 GPU, ray.io/accelerator-type=H200; "
            "the Ray cluster (nodes: 3, 20 CPU, 4 GPU) has room for 0")),
        # Those with labels first: a prefill worker would take a GPU of the only node for decode workers.
        ([HEAD_NODE, node(), node(accelerator="A10G")], ["launcher.ray.placement.decode.accelerator=H100"], ""),
        # The large ones first: two prompts of one GPU each would break up the two nodes.
        ([HEAD_NODE, node(), node(), node()], ["launcher.ray.placement.decode.gpus=2"], ""),
    ],
)  # fmt: skip
def test_the_pool_that_finds_no_room_is_named_with_what_it_asks_for(
    nodes: list[Node], sets: list[str], why: str
) -> None:
    assert lacking(nodes, *sets) == why


def test_pools_that_want_one_zone_get_the_first_that_has_room_for_all() -> None:
    sets = ["launcher.ray.placement.prefill.zone=same", "launcher.ray.placement.decode.zone=same"]
    nodes = [HEAD_NODE, node(zone="a"), node(zone="b"), node(zone="b")]
    assert {asked(nodes, *sets)[role].labels[ZONE_LABEL] for role in ("prefill", "decode")} == {"b"}
    assert lacking(nodes, *sets) == ""
    assert lacking(nodes[:-1], *sets).endswith("has room for 1")
    assert "ray.io/availability-zone=none" in lacking([HEAD_NODE], *sets)


def test_those_that_want_one_node_keep_it_while_it_has_room_for_them() -> None:
    sets = ["launcher.ray.placement.prefill.same_node=true", "launcher.ray.placement.decode.same_node=true"]

    def named(name: str, gpus: float) -> Node:
        return Node(name, {"CPU": 8.0, "GPU": gpus}, {NODE_LABEL: name})

    large = [named("b", 4.0), named("d", 4.0)]
    wanted, near = asks(configured(*sets), [HEAD_NODE, named("a", 2.0), *large])
    assert near == "b"
    assert [wanted[role].labels for role in ("prefill", "decode", "front_proxy")] == [
        {NODE_LABEL: "b"}, {NODE_LABEL: "b"}, {},
    ]  # fmt: skip
    assert asks(configured(*sets), [HEAD_NODE, *large], near="d")[1] == "d"
    assert asks(configured(*sets), [HEAD_NODE, large[0]], near="d")[1] == "b"
    assert lacking([HEAD_NODE, named("a", 2.0)], *sets).endswith("has room for 1")


def test_a_worker_on_several_nodes_asks_each_for_its_share_and_finds_room_on_different_ones() -> None:
    sets = ("engine.tensor_parallel_size=4", "launcher.ray.placement.decode.nodes=2", "launcher.prefill=0")
    ask = asked([HEAD_NODE, node()], *sets)["decode"]
    assert (ask.nodes, ask.resources) == (2, {"CPU": 1.0, "GPU": 2.0})
    assert ask.bundles() == {"bundles": [{"CPU": 1.0, "GPU": 2.0}] * 2, "strategy": "STRICT_SPREAD"}
    assert lacking([HEAD_NODE, *[node()] * 4], *sets) == ""
    assert lacking([HEAD_NODE, node(gpus=8.0), node()], *sets) == (
        "launcher.ray.placement.decode asks for 2 times 2 nodes, each with 1 CPU, 2 GPU; "
        "the Ray cluster (nodes: 3, 20 CPU, 10 GPU) has room for 1"
    )


def test_each_pool_asks_for_the_gpus_of_its_own_engine() -> None:
    wanted = asked([HEAD_NODE, node()], "launcher.engine.decode.data_parallel_size=4")
    assert [wanted[role].resources["GPU"] for role in ("prefill", "decode")] == [1.0, 4.0]


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (["engine.tensor_parallel_size=4", "launcher.ray.placement.decode.nodes=2"], ""),
        (
            ["engine.tensor_parallel_size=3", "launcher.ray.placement.decode.nodes=2"],
            (
                "launcher.ray.placement.decode.nodes=2: the 3 ranks of an engine "
                "(tensor_parallel_size times pipeline_parallel_size) cannot be spread evenly"
            ),
        ),
        (
            ["launcher.ray.placement.front_proxy.nodes=2"],
            "launcher.ray.placement.front_proxy.nodes=2: only the engine of a worker runs on several nodes",
        ),
        (
            ["engine.data_parallel_size=2", "launcher.ray.placement.decode.nodes=2"],
            "launcher.ray.placement.decode.nodes=2: the ranks of engine.data_parallel_size=2 share one node",
        ),
    ],
)
def test_an_engine_that_cannot_be_spread_over_its_nodes_is_refused(sets: list[str], why: str) -> None:
    assert objection(configured(*sets)) == why
