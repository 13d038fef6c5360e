"""The environment that child processes get. Computes a map; changes nothing of its own process."""

from __future__ import annotations

from collections.abc import Mapping

from runtime import GRPC_ENVIRONMENT

# Set by `baton up` for the processes it starts: they end when it does, however it does.
CHILD_VARIABLE = "BATON_CHILD"
# What the operator has set wins over all of these.
_DEFAULTS = {
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    **GRPC_ENVIRONMENT,
    # Idle OpenMP threads that spin would take the cores of the other engines.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def child_environment(
    environ: Mapping[str, str], *, threads: int | None = None, model_is_local: bool = False
) -> dict[str, str]:
    """``environ`` with what every process of a cluster needs. ``threads`` is one process's share of the cores."""
    child = _DEFAULTS | dict(environ)
    if threads is not None:
        child.setdefault("OMP_NUM_THREADS", str(threads))
    if model_is_local:
        # Without this every start asks the model hub about a folder on this disk.
        child.setdefault("HF_HUB_OFFLINE", "1")
    return child
