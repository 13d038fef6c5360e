"""This machine as a host: processes are children of `baton up`, which holds ports for them. Decides nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import baton_llm
from launcher import model_choice
from launcher.backend import ProcessSpec, Tell
from launcher.config import BatonConfig
from launcher.local.child import Child, tail
from launcher.local.environment import CHILD_VARIABLE, child_environment
from launcher.local.ports import HeldPorts

CONFIG_FILE = "config.json"
LOGS = "logs"

CommandOf = Callable[[ProcessSpec, Sequence[str]], list[str]]


class LocalHost:
    """Starts children with the configuration file and the logs in ``state_dir``. A ProcessHost."""

    def __init__(
        self, config: BatonConfig, state_dir: Path, *, ports: HeldPorts, command: CommandOf | None = None
    ) -> None:
        self._model_is_local = model_choice.is_local(config.engine.model)
        self._state_dir = state_dir
        self._ports = ports
        self._command = command or self._baton
        self._started: set[str] = set()

    async def start(self, spec: ProcessSpec, tell: Tell) -> Child:
        """Start one child. Raises OSError or StartError when the system refuses."""
        log = self._log(spec.id)
        if spec.id not in self._started:
            log.unlink(missing_ok=True)  # an earlier cluster's
        self._started.add(spec.id)
        self._ports.admit(spec.id)
        environ = child_environment(os.environ, threads=spec.threads, model_is_local=self._model_is_local)
        # The configuration file has these already. In the environment they would override a process's own settings.
        environ = {name: value for name, value in environ.items() if not name.startswith("BATON_")}
        environ |= {CHILD_VARIABLE: "1", **spec.environ, **self._ports.variables(spec.id)}
        http_fd = self._ports.http_fd(spec.id)
        return await Child.start(
            spec.id,
            self._command(spec, [*spec.settings, *self._ports.settings(spec.id)]),
            environ=environ,
            log=log,
            tell=tell,
            pass_fds=() if http_fd is None else (http_fd,),
        )

    def log(self, process_id: str) -> str:
        """The log file of a process and its successors."""
        return str(self._log(process_id))

    async def logs(self, process_id: str, lines: int) -> Sequence[str]:
        """The last lines of it."""
        return tail(self._log(process_id), lines)

    def stays_down(self, process_id: str) -> None:
        """Refuse its clients, who would wait in the queue of its port."""
        self._ports.refuse(process_id)

    def close(self) -> None:
        """Let all ports go."""
        self._ports.close()

    def _log(self, process_id: str) -> Path:
        return self._state_dir / LOGS / f"{process_id}.log"

    def _baton(self, spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
        return command_of(self._state_dir / CONFIG_FILE, spec, settings)


def command_of(config_file: Path, spec: ProcessSpec, settings: Sequence[str]) -> list[str]:
    """How a process of the plan is started."""
    arguments = [part for setting in settings for part in ("--set", setting)]
    return baton_llm.command(spec.command, "--config", str(config_file), *arguments)
