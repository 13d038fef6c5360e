"""`baton up`: starts a cluster, announces it, and stops it on a signal. The backend runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from launcher import model_choice
from launcher.backend import ProcessHost, StartError
from launcher.config import BatonConfig, drain_s
from launcher.hosted import actuator, operator_commands, status
from launcher.hosted.actuator import Actuator
from launcher.hosted.backend import HostedBackend, Outcome
from launcher.hosted.control_service import serve_control
from launcher.hosted.process_plan import plan, pools, prepared
from launcher.hosted.processes import tell
from launcher.hosted.rolling_restart import RollingRestart
from launcher.hosted.state_file import StateError, owned, write_atomically
from launcher.hosted.timing import Timing
from launcher.local.host import CONFIG_FILE, LocalHost
from launcher.local.ports import HeldPorts
from launcher.ray.host_actor import folder_of
from runtime.configuration import DEFAULT, BadConfiguration, dump
from runtime.rpc import trust

# vLLM's: keep what /v1/responses answered, in the memory of one process.
_STORE_VARIABLE = "VLLM_ENABLE_RESPONSES_API_STORE"


def up(config: BatonConfig, sources: Mapping[str, str]) -> int:
    """Run a cluster until it is told to stop; returns the exit code of `baton up`.

    Raises BadConfiguration, StartError, StateError, ModelError or DemoModelError before anything was started.
    """
    state_dir = Path(config.launcher.state_dir).expanduser().absolute()
    on_ray = config.launcher.backend == "ray"
    with owned(state_dir), contextlib.ExitStack() as ends:
        config = prepared(config, sources, folder_of(config.launcher.ray.cluster) if on_ray else state_dir)
        _check_store(config, sources, os.environ)
        trust.use(config.tls)
        trust.open_front_door(config.front_proxy.tls_cert_file, config.front_proxy.tls_key_file)
        try:
            make_host = _ray(config) if on_ray else _local(config, state_dir, ends)
            # Until the event loop runs, SIGTERM works as Ctrl-C does: a call to the model hub may be slow.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            config = model_choice.choose(config, sources, os.environ, tell)
        except KeyboardInterrupt:
            tell("stopped before anything was started")
            return 0
        try:
            write_atomically(state_dir / CONFIG_FILE, dump(config))
        except OSError as error:
            raise StateError(f"cannot write {state_dir / CONFIG_FILE}: {error.strerror}") from error
        return asyncio.run(_run(config, state_dir, make_host))


MakeHost = Callable[[BatonConfig], ProcessHost]


def _local(config: BatonConfig, state_dir: Path, ends: contextlib.ExitStack) -> MakeHost:
    """This machine, which holds the ports from here on. Raises StartError."""
    ports = ends.enter_context(contextlib.closing(HeldPorts.take(config, plan(config))))
    return lambda final: LocalHost(final, state_dir, ports=ports)


def _ray(config: BatonConfig) -> MakeHost:
    """The Ray cluster, which has room for all. Raises StartError."""
    try:
        from launcher.ray import cluster
        from launcher.ray.host import RayHost
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise StartError("launcher.backend=ray needs the package ray: pip install 'baton-llm[ray]'") from error
    cluster.connect(config, tell)
    return lambda final: RayHost(final, [spec.id for spec in plan(final)])


async def _run(config: BatonConfig, state_dir: Path, make_host: MakeHost) -> int:
    return await Cluster(config, state_dir, make_host(config)).run()


def _check_store(config: BatonConfig, sources: Mapping[str, str], environ: Mapping[str, str]) -> None:
    """Raise BadConfiguration where several front proxies would keep responses that later requests ask for."""
    if config.launcher.front_proxies > 1 and environ.get(_STORE_VARIABLE, "0") not in ("", "0"):
        why = f"each would keep other responses, and a later request may reach another one; unset {_STORE_VARIABLE}"
        raise BadConfiguration("launcher.front_proxies", why, sources.get("launcher.front_proxies", DEFAULT))


class Cluster:
    """One cluster, from the first start to the last end."""

    def __init__(
        self, config: BatonConfig, state_dir: Path, host: ProcessHost, *, timing: Timing | None = None
    ) -> None:
        self._config = config
        self._timing = timing or Timing()
        self.backend = HostedBackend(config, state_dir, host, self._timing)
        self._stopping = False

    async def run(self) -> int:
        """Start everything, supervise it, stop it on a signal; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            outcome = await self.backend.start()
            if outcome == "ready":
                outcome = await self._serve()
        finally:
            self._stopping = True
            await self.backend.close()
        return 1 if outcome == "failed" else 0

    async def _serve(self) -> Outcome:
        self._announce()
        restarts = RollingRestart(
            self.backend,
            roles={pool.name: pool.role for pool in pools(self._config)},
            drain_s=lambda role: drain_s(role, self._config),
            status=lambda address: status.ask(address, timeout_s=self._timing.status_timeout_s),
            within_s=self._config.launcher.start_timeout_s,
            poll_interval_s=self._timing.poll_interval_s,
        )
        async with serve_control(restarts) as address, self._scaling():
            self.backend.state.note(control_address=address)
            outcome = await self.backend.supervise()
            self.backend.state.note(control_address="")
        return outcome

    def _scaling(self) -> AbstractAsyncContextManager[None]:
        """The pools follow what the scheduler wants, where that is this process's job."""
        launcher = self._config.launcher
        if self._config.scheduler.scaling.actuator != actuator.NAME:
            return contextlib.nullcontext()
        schedulers = lambda: operator_commands.schedulers(self.backend.state.record)  # noqa: E731
        workers_max = launcher.prefill + launcher.decode
        return actuator.running(Actuator(self.backend, schedulers, workers_max=workers_max, say=tell))

    def _announce(self) -> None:
        """Print the ready line."""
        state = self.backend.state
        fronts = (one for one in state.record.processes if one.role == "front_proxy")
        front = next(one for one in fronts if one.state == "ready")
        url = f"{'https' if trust.front_door() else 'http'}://{front.address}"
        state.note(url=url, grpc_address=front.grpc_address)
        name = model_choice.served_name(self._config)
        print(f"ready {url} grpc {front.grpc_address} model {name}", flush=True)

    def _on_signal(self) -> None:
        if self._stopping:
            tell("told to stop a second time: killing everything")
            self.backend.processes.kill_all()
            return
        self._stopping = True
        self.backend.interrupt()
