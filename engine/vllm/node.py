"""Ranks of a worker's engine on a further node: vLLM's worker processes alone. Takes no request; their leader does."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import structlog
from vllm.usage.usage_lib import UsageContext
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from engine.config import EngineConfig
from engine.epoch import next_epoch
from engine.vllm import args
from kv_transfer.tiers.config import Tier

log = structlog.get_logger(__name__)


def serve(
    config: EngineConfig,
    *,
    worker_id: str,
    ready: Callable[[Mapping[str, str]], None],
    tiers: Sequence[Tier] = (),
) -> None:
    """Run the ranks of ``config.args["node_rank"]`` until one of them ends, or a signal.

    ``ready`` is called when every rank of the engine, on all nodes, has loaded its part of the model.
    Raises ValueError for settings that cannot work, and what vLLM raises when the leader cannot be reached.
    """
    args.prepare_environment(config)
    # Nothing listens here: the leader answers other engines for all ranks.
    nowhere = args.SideChannelAddress("", "", 0)
    engine_id = f"{worker_id}-{next_epoch()}"
    arguments = args.engine_args(config, engine_id=engine_id, side_channel=nowhere, tiers=tiers)
    vllm_config = arguments.create_engine_config(usage_context=UsageContext.ENGINE_CONTEXT, headless=True)
    log.info("starting vLLM's ranks of one node", worker=worker_id, engine=engine_id, node=config.args["node_rank"])
    signal.signal(signal.SIGTERM, _exit)
    executor = MultiprocExecutor(vllm_config, monitor_workers=False)
    ready({})
    # Returns when one of them has ended.
    executor.start_worker_monitor(inline=True)


def _exit(*_: object) -> NoReturn:
    raise SystemExit(0)
