"""`baton doctor`: one table of what is well and what is not, before a cluster starts and while it runs."""

from __future__ import annotations

import asyncio
from typing import Annotated

from cli.settings import NO_SOURCES, Given, KvTiers, Model, Sources, StateDir, kv_tiers, load, setting, state_folder


def doctor(
    *,
    model: Model = None,
    prefill: Annotated[Given | None, setting("launcher.prefill", "number of prefill workers", "N")] = None,
    decode: Annotated[Given | None, setting("launcher.decode", "number of decode workers", "M")] = None,
    kv_tier: KvTiers = (),
    state_dir: StateDir = None,
    json: bool = False,
    sources: Sources = NO_SOURCES,
) -> int:
    """Look for what would go wrong: limits, ports, versions, tiers, certificates; of a running cluster, its pulls.

    Before a start it looks at this machine with the settings of `baton up`. Where a cluster of the state folder runs,
    it also has every decode worker pull a little KV from every prefill worker, one pair after the other, and says by
    which transport and how fast. The exit code is 1 if a row says fail.

    Parameters
    ----------
    json
        print JSON
    """
    import msgspec

    from launcher.doctor import cluster, machine
    from launcher.doctor.report import as_json, as_table, failed

    config = load(sources, model, prefill, decode, kv_tiers(kv_tier), state_dir).value
    record = cluster.running(state_folder(config))
    hosts: set[str] = set()
    if record is not None:
        # What the cluster has, whatever this call was told. On Ray its processes listen on the nodes' own addresses.
        config = msgspec.structs.replace(config, tls=record.tls)
        addresses = [process.grpc_address for process in record.processes if process.role != "front_proxy"]
        hosts = {address.rpartition(":")[0].strip("[]") for address in addresses if address}
    rows = machine.look(config, running=record is not None, hosts=hosts)
    if record is not None:
        rows += asyncio.run(cluster.look(record, config))
    print(as_json(rows) if json else as_table(rows))
    return 1 if failed(rows) else 0
