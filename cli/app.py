"""The `baton` command: reads arguments and configuration, then calls what does the work. Imports nothing heavy."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from cli import chaos_command

# Before grpc is imported by anyone: its fork handlers and the engines' own processes do not get on.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

if TYPE_CHECKING:
    from launcher.config import BatonConfig
    from launcher.process_plan import Role
    from runtime.configuration import Loaded

_EXIT_USAGE = 2
_ROLES: dict[str, Role] = {
    "scheduler": "scheduler",
    "prefill": "prefill",
    "decode": "decode",
    "front-proxy": "front_proxy",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one `baton` command and return its exit code."""
    arguments = _parser().parse_args(argv)
    from launcher.control import CommandError
    from launcher.demo_model import DemoModelError
    from launcher.model_choice import ModelError
    from launcher.ports import StartError
    from launcher.state import StateError
    from runtime.configuration import BadConfiguration

    try:
        code: int = arguments.call(arguments)
    except BadConfiguration as error:
        return _fail(f"configuration: {error}", _EXIT_USAGE)
    except (StartError, StateError, ModelError, DemoModelError, CommandError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton", description="Serve language models with prefill and decode apart.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", metavar="FILE", type=Path, help="TOML or JSON file with settings")
    shared.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="sets", help="one setting; may be repeated"
    )

    up = commands.add_parser("up", parents=[shared], help="start a cluster on this machine")
    _flag(
        up, "--model", "engine.model", "folder or hub name of the model (default: a small demo model)", metavar="MODEL"
    )
    _flag(up, "--prefill", "launcher.prefill", "number of prefill workers", metavar="N")
    _flag(up, "--decode", "launcher.decode", "number of decode workers", metavar="M")
    _front_flags(up)
    _flag(up, "--state-dir", "launcher.state_dir", "folder for state and logs", metavar="DIR")
    up.set_defaults(call=_up)

    status = commands.add_parser("status", parents=[shared], help="show every process of a cluster")
    _flag(status, "--state-dir", "launcher.state_dir", "the folder given to `baton up`", metavar="DIR")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(call=_status)

    _add_operations(commands, shared)
    chaos = commands.add_parser("chaos", parents=[shared], help="break a real cluster under traffic and judge it")
    chaos_command.add_arguments(chaos)
    chaos.set_defaults(call=chaos_command.run)

    _add_roles(commands, shared)

    config = commands.add_parser("config", parents=[shared], help="print the settings and where each comes from")
    form = config.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a file that --config reads")
    form.add_argument("--schema", action="store_true", help="print the JSON schema of that file")
    config.set_defaults(call=_config)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(call=_version)
    return parser


def _add_operations(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser
) -> None:
    drain = commands.add_parser("drain", parents=[shared], help="let a worker finish what it runs and take nothing new")
    drain.add_argument("worker", metavar="WORKER", help="its id in `baton status`; it stays up until it is restarted")
    _flag(drain, "--state-dir", "launcher.state_dir", "the folder given to `baton up`", metavar="DIR")
    _flag(drain, "--timeout", "worker.drain_timeout_s", "how long to wait until it is idle", metavar="S")
    drain.set_defaults(call=_drain)
    restart = commands.add_parser("restart", parents=[shared], help="replace a process of `baton up`, losing nothing")
    restart.add_argument("process", metavar="WORKER|all", help="an id in `baton status`, or all, one after the other")
    _flag(restart, "--state-dir", "launcher.state_dir", "the folder given to `baton up`", metavar="DIR")
    restart.set_defaults(call=_restart)


def _add_roles(commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    scheduler = commands.add_parser("scheduler", parents=[shared], help="run one scheduler")
    _flag(scheduler, "--host", "scheduler.host", "address to listen on", metavar="H")
    _flag(scheduler, "--port", "scheduler.port", "gRPC port", metavar="P")
    for name in ("prefill", "decode"):
        worker = commands.add_parser(name, parents=[shared], help=f"run one {name} worker")
        _flag(
            worker,
            "--model",
            "engine.model",
            "folder or hub name of the model (default: a small demo model)",
            metavar="MODEL",
        )
        _flag(worker, "--id", "worker.worker_id", "name of this worker, unique in the cluster", metavar="ID")
        _flag(worker, "--host", "worker.host", "address to listen on", metavar="H")
        _flag(worker, "--port", "worker.port", "gRPC port", metavar="P")
        _flag(worker, "--scheduler", "worker.scheduler_address", "the scheduler", metavar="HOST:PORT")
    front = commands.add_parser("front-proxy", parents=[shared], help="run one front proxy")
    _flag(
        front,
        "--model",
        "engine.model",
        "the workers' model, for its tokenizer (default: a small demo model)",
        metavar="MODEL",
    )
    _front_flags(front)
    _flag(front, "--scheduler", "front_proxy.scheduler_address", "the scheduler", metavar="HOST:PORT")
    for name, role in _ROLES.items():
        commands.choices[name].set_defaults(call=_serve, role=role)


def _front_flags(parser: argparse.ArgumentParser) -> None:
    _flag(parser, "--host", "front_proxy.host", "address to listen on", metavar="H")
    _flag(parser, "--port", "front_proxy.port", "HTTP port; 0: any free one", metavar="P")
    _flag(parser, "--grpc-port", "front_proxy.grpc_port", "gRPC port; 0: any free one", metavar="G")


def _flag(parser: argparse.ArgumentParser, flag: str, path: str, meaning: str, *, metavar: str | None = None) -> None:
    """A flag that is short for one setting; the configuration checks its value like any other."""
    parser.add_argument(flag, metavar=metavar, dest=f"setting:{path}", help=f"{meaning} [{path}]")


def _load(arguments: argparse.Namespace) -> Loaded[BatonConfig]:
    from launcher.config import BatonConfig
    from runtime.configuration import load

    flags = [
        f"{name.removeprefix('setting:')}={value}"
        for name, value in vars(arguments).items()
        if name.startswith("setting:") and value is not None
    ]
    return load(BatonConfig, file=arguments.config, environ=os.environ, sets=[*arguments.sets, *flags])


def _check_engine(loaded: Loaded[BatonConfig]) -> None:
    """Raise BadConfiguration for what vLLM would refuse after a long start."""
    from engine import preflight
    from runtime.configuration import BadConfiguration, source_of

    found = preflight.objection(loaded.value.engine, os.environ)
    if found is not None:
        raise BadConfiguration(found.path, found.reason, source_of(loaded, found.path))


def _up(arguments: argparse.Namespace) -> int:
    from launcher.up import up

    loaded = _load(arguments)
    _check_engine(loaded)
    return up(loaded.value, loaded.sources)


def _status(arguments: argparse.Namespace) -> int:
    from launcher import state, status

    config = _load(arguments).value
    record = state.read(_state_dir(config))
    lines = asyncio.run(status.collect(record, timeout_s=config.launcher.status_timeout_s))
    print(status.as_json(lines) if arguments.json else status.as_table(lines))
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    from launcher import operate

    config = _load(arguments).value
    asyncio.run(
        operate.drain(
            _state_dir(config),
            arguments.worker,
            timeout_s=config.worker.drain_timeout_s,
            status_timeout_s=config.launcher.status_timeout_s,
            say=lambda line: print(line, flush=True),
        )
    )
    print(f"{arguments.worker} is idle and takes nothing new until `baton restart {arguments.worker}`")
    return 0


def _restart(arguments: argparse.Namespace) -> int:
    from launcher import operate

    state_dir = _state_dir(_load(arguments).value)
    asyncio.run(operate.restart(state_dir, arguments.process, say=lambda line: print(line, flush=True)))
    return 0


def _state_dir(config: BatonConfig) -> Path:
    return Path(config.launcher.state_dir).expanduser().absolute()


def _serve(arguments: argparse.Namespace) -> int:
    from launcher.serve import serve

    loaded = _load(arguments)
    config = loaded.value
    if arguments.role in ("prefill", "decode") and not config.worker.scheduler_address:
        return _fail("worker.scheduler_address: a worker needs its scheduler's HOST:PORT (--scheduler)", _EXIT_USAGE)
    if arguments.role == "front_proxy" and not config.front_proxy.scheduler_address:
        text = "front_proxy.scheduler_address: a front proxy needs its scheduler's HOST:PORT (--scheduler)"
        return _fail(text, _EXIT_USAGE)
    if arguments.role != "scheduler":
        _check_engine(loaded)
        from launcher import model_choice
        from launcher.local_processes import tell

        config = model_choice.choose(config, loaded.sources, os.environ, tell)
    return serve(arguments.role, config)


def _config(arguments: argparse.Namespace) -> int:
    import msgspec

    from launcher.config import BatonConfig
    from runtime.configuration import dump, settings

    loaded = _load(arguments)
    if arguments.schema:
        print(msgspec.json.format(msgspec.json.encode(msgspec.json.schema(BatonConfig)), indent=2).decode())
    elif arguments.json:
        print(dump(loaded.value).decode(), end="")
    else:
        for setting in settings(loaded):
            print(f"{setting.path} = {msgspec.json.encode(setting.value).decode()}  # {setting.source}")
    return 0


def _version(_: argparse.Namespace) -> int:
    try:
        print(f"baton {metadata.version('baton-llm')}")
    except metadata.PackageNotFoundError:
        print("baton (not installed)")
    return 0


def _fail(message: str, code: int) -> int:
    print(f"baton: error: {message}", file=sys.stderr)
    return code
