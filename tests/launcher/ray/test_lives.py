"""The processes of a worker on several nodes, before Ray is asked for anything."""

from __future__ import annotations

from launcher.backend import ProcessSpec
from launcher.ray.lives import part_of


def test_the_first_node_runs_the_worker_and_the_others_ranks_of_its_engine() -> None:
    spec = ProcessSpec(
        id="decode-0", role="decode", settings=("worker.worker_id=decode-0",), environ={"BATON_EPOCH_MIN": "7"}
    )
    leader, follower = (part_of(spec, rank, hosts=["10.0.0.2", "10.0.0.3"], port=4242, epoch=9) for rank in (0, 1))
    assert (leader.id, leader.command) == ("decode-0", "decode")
    assert (follower.id, follower.command) == ("decode-0.1", "engine-node")
    shared = {
        "worker.worker_id=decode-0",
        "engine.args.nnodes=2",
        "engine.args.master_addr=10.0.0.2",
        "engine.args.master_port=4242",
        "engine.args.distributed_executor_backend=mp",
    }
    assert {*leader.settings} == shared | {"engine.args.node_rank=0"}
    assert {*follower.settings} == shared | {"engine.args.node_rank=1"}
    assert leader.environ == {"BATON_EPOCH_MIN": "7", "BATON_EPOCH": "9", "VLLM_HOST_IP": "10.0.0.2"}
    assert follower.environ["VLLM_HOST_IP"] == "10.0.0.3"
