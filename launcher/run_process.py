"""Runs one Baton process: scheduler, worker or front proxy. Imports only what that one process needs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import sys
from collections.abc import Coroutine, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import msgspec

from launcher.config import BatonConfig, drain_s
from launcher.local import temp_dirs
from launcher.local.child import READY_PREFIX
from launcher.local.environment import CHILD_VARIABLE
from launcher.local.ports import HTTP_FD_VARIABLE, STATUS_PORT_VARIABLE
from runtime.process import lifecycle, logs, open_files, orphan
from runtime.process.exit_codes import ExitCode
from runtime.roles import Role, WorkerRole
from runtime.rpc import trust
from runtime.user_error import UserError

if TYPE_CHECKING:
    from worker.role import MakeRole

EXIT_TIMEOUT_S = 15.0
"""Time that a process has to exit after its work has ended. Then it ends itself by force, to be restarted."""
_PART_GRACE_S = 5.0
"""Time that the ranks of a further node have to end. They have no requests of their own."""


def serve(role: Role, config: BatonConfig) -> int:
    """Run the process to its end and return its exit code."""
    # As long as `baton up` would have given it.
    with _ending_with_launcher(drain_s(role, config) + config.launcher.stop_timeout_s):
        return _serve(role, config)


def serve_engine_node(config: BatonConfig) -> int:
    """Run the ranks of a worker's engine on a further node; returns the exit code when they, or the leader, end."""
    with _ending_with_launcher(_PART_GRACE_S):
        _serve_engine_node(config)
    return ExitCode.PART_DIED


def _serve_engine_node(config: BatonConfig) -> None:
    logs.configure_logging(config.worker.log_level, f"{config.worker.worker_id}.{config.engine.args.get('node_rank')}")
    _use_own_log_format(os.environ)
    open_files.raise_limit()
    from engine.vllm import node
    from kv_transfer.tiers.config import parse

    node.serve(config.engine, worker_id=config.worker.worker_id, ready=announce, tiers=parse(config.kv.tiers))


@contextlib.contextmanager
def _ending_with_launcher(grace_s: float) -> Iterator[None]:
    """End ``grace_s`` after the launcher that has started this process. One started by hand outlives its shell."""
    if not os.environ.get(CHILD_VARIABLE):
        yield
        return
    clean_up_behind_parent = orphan.stop_with_parent(grace_s, clean_up=_remove_temp_dir)
    try:
        yield
    finally:
        clean_up_behind_parent()


def _remove_temp_dir() -> None:
    """Remove the folder that `baton up` made for this process's temporary files, where it made one."""
    folder = Path(os.environ.get("TMPDIR", ""))
    if folder.name.startswith(temp_dirs.PREFIX):
        temp_dirs.remove(folder)


def _serve(role: Role, config: BatonConfig) -> int:
    logs.configure_logging(config.of_role(role).log_level, process_id(role, config))
    _use_own_log_format(os.environ)
    open_files.raise_limit()
    trust.use(config.tls)
    if role == "front_proxy":
        trust.open_front_door(config.front_proxy.tls_cert_file, config.front_proxy.tls_key_file)
    try:
        lifecycle.run(_watched(_main(role, config)), exit_timeout_s=EXIT_TIMEOUT_S)
    except (OSError, BaseExceptionGroup) as error:
        refused = _known_error(error)
        if refused is None:
            raise
        if isinstance(refused, UserError):
            raise refused from None
        # A taken port, an address that is not ours, a full disk: the sentence says it all.
        print(f"baton: error: {process_id(role, config)}: {refused}", file=sys.stderr)
        return 1
    return 0


def _use_own_log_format(environ: MutableMapping[str, str]) -> None:
    """Have vLLM's processes write their logs in our form, unless the operator configured them."""
    if not any(name.startswith(("VLLM_LOGGING_", "VLLM_CONFIGURE_LOGGING")) for name in environ):
        environ["VLLM_LOGGING_CONFIG_PATH"] = str(Path(__file__).parent.parent / "engine" / "vllm" / "logging.json")


def _known_error(error: BaseException) -> OSError | UserError | None:
    """The one such error that ended a process, alone or in a task group; None when more went wrong beside it."""
    match error:
        case OSError() | UserError():
            return error
        case BaseExceptionGroup(exceptions=(only,)):
            return _known_error(only)
        case _:
            return None


def process_id(role: Role, config: BatonConfig) -> str:
    """The name of this process in its log."""
    match role:
        case "scheduler":
            return config.scheduler.scheduler_id or "scheduler"
        case "prefill" | "decode":
            return config.worker.worker_id or f"{role}-{os.getpid()}"
        case "front_proxy":
            return config.front_proxy.front_proxy_id or f"front-proxy-{os.getpid()}"
        case _:
            assert_never(role)


def announce(addresses: Mapping[str, str]) -> None:
    """Print the ready line, by which the launcher learns that this process serves."""
    lifecycle.settle_heap()
    line = msgspec.json.encode({"pid": str(os.getpid()), **addresses}).decode()
    sys.stdout.write(f"{READY_PREFIX}{line}\n")
    sys.stdout.flush()


async def _watched(main: Coroutine[Any, Any, None]) -> None:
    """The process, with an eye on its certificates."""
    watching = asyncio.create_task(trust.watch(), name="certificates")
    try:
        await main
    finally:
        watching.cancel()


def _main(role: Role, config: BatonConfig) -> Coroutine[Any, Any, None]:
    match role:
        case "scheduler":
            from scheduler.run import run as run_scheduler

            model = config.engine.served_model_name or config.engine.model
            return run_scheduler(config.scheduler, announce, auth=config.auth, accounts=config.accounts, model=model)
        case "prefill" | "decode":
            from decode_worker.role import DecodeRole
            from prefill_worker.role import PrefillRole
            from worker.run import serve as serve_worker

            make_roles: dict[WorkerRole, MakeRole] = {
                "prefill": functools.partial(PrefillRole, config.prefill_worker),
                "decode": functools.partial(DecodeRole, config.decode_worker),
            }
            return serve_worker(role, make_roles, config.engine, config.worker, announce, kv=config.kv)
        case "front_proxy":
            from front_proxy.run import run as run_front

            return run_front(
                config.engine,
                config.front_proxy,
                announce,
                policy=config.scheduler,
                auth=config.auth,
                accounts=config.accounts,
                listener=_inherited(),
                status_port=int(os.environ.pop(STATUS_PORT_VARIABLE, "0")),
            )
        case _:
            assert_never(role)


def _inherited() -> socket.socket | None:
    """The socket that `baton up` holds for this front proxy; None if it was started on its own."""
    fd = os.environ.pop(HTTP_FD_VARIABLE, "")
    if not fd:
        return None
    listener = socket.socket(fileno=int(fd))
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener
