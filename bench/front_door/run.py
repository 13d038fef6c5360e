"""The command front-door: start what can be started, visit it in interleaved rounds, end all of it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from cyclopts import Parameter

from bench.children import ChildFailedError
from bench.front_door import packages, report
from bench.front_door.checkout import checkout
from bench.front_door.client import Client, GrpcClient, HttpClient
from bench.front_door.measure import FrontDoorSpec, Visit, prompts_of_visit, visit
from bench.front_door.systems import (
    MODEL_NAME,
    SYSTEM_NAMES,
    Front,
    Rig,
    SystemName,
    start_baton,
    start_dynamo,
    start_router,
)
from bench.front_door.tokens import write_folder
from bench.peers import earlier_command
from bench.prompts import make_prompts, token_counter
from bench.report import environment
from launcher.demo import model as demo_model

Result = TypeVar("Result")
_SPEC = FrontDoorSpec()
# Modules to import, and the requirements file that has it.
_PEERS: Mapping[SystemName, tuple[str, str]] = {
    "dynamo": ("dynamo.frontend, dynamo.mocker", "dynamo.txt"),
    "vllm_router": ("vllm_router.launch_router", "bench.txt"),
}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def rig(step_ms: float, sets: Sequence[str]) -> AsyncIterator[Rig]:
    """A model folder and a place for processes; whatever happens, they are ended and the files removed."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    # Like Ctrl-C, which asyncio turns into the same.
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="baton-front-door-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        model = write_folder(demo_model.SHIPPED, folder / "model")
        running = Rig(model=model, step_ms=step_ms, folder=folder, sets=sets)
        try:
            yield running
        finally:
            await running.stop()
            loop.remove_signal_handler(signal.SIGTERM)


async def start_all(
    running: Rig, spec: FrontDoorSpec, against: str, peers_dir: Path, keep: contextlib.ExitStack
) -> tuple[dict[SystemName, Front], dict[str, str]]:
    """Every front end that was asked for and can be started, and why the others cannot."""
    fronts: dict[SystemName, Front] = {}
    left_out: dict[str, str] = {}
    wanted = spec.systems or tuple(name for name in SYSTEM_NAMES if name != "earlier" or against)
    if {"baton", "baton_grpc", "vllm_router"} & {*wanted}:
        _say("starting baton")
        fronts["baton"] = fronts["baton_grpc"] = await start_baton(running, "baton")
    if "earlier" in wanted:
        folder = keep.enter_context(checkout(against))
        _say(f"starting earlier: {against}")
        fronts["earlier"] = await start_baton(running, "earlier", earlier_command(folder), folder)
    for name, (modules, requirements) in _PEERS.items():
        if name not in wanted:
            continue
        _say(f"starting {name}")
        why = await asyncio.to_thread(packages.why_missing, modules, requirements, peers_dir)
        try:
            if not why and name == "dynamo":
                fronts[name] = await start_dynamo(running, str(peers_dir))
            elif not why:
                fronts[name] = await start_router(running, str(peers_dir), fronts["baton"].base_url)
        except ChildFailedError as error:
            why = str(error)
        if why:
            left_out[name] = why
            _say(f"{name}: left out: {why}")
    return {name: fronts[name] for name in wanted if name in fronts}, left_out


async def run_rounds(fronts: Mapping[SystemName, Front], spec: FrontDoorSpec, model: Path) -> list[Visit]:
    """Every visit; each round begins with another system."""
    encode = tokens_of(model)
    visits = []
    for round_index in range(spec.rounds):
        seed = spec.seed * 1009 + round_index
        prompts = make_prompts(
            requests=prompts_of_visit(spec), tokens=spec.prompt_tokens, seed=seed, count=token_counter(model)
        )
        turn = round_index % len(fronts)
        for name in [*fronts][turn:] + [*fronts][:turn]:
            client = client_of(name, fronts[name], spec, {prompt: encode(prompt) for prompt in prompts})
            made = await visit(name, fronts[name], client, spec=spec, prompts=prompts, round_index=round_index)
            visits.append(made)
            _say(
                f"round {round_index + 1}/{spec.rounds}: {name}: {made.values['cpu_us_per_token']:.1f} us a token, "
                f"{made.values['cpu_ms_per_request']:.2f} ms a request, burst TTFT "
                f"{made.values['burst64_ttft_mean_ms']:.1f} ms, failed {len(made.errors)}"
            )
    return visits


def tokens_of(model: Path) -> Callable[[str], list[int]]:
    """Token ids of a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text).ids)


def client_of(name: SystemName, front: Front, spec: FrontDoorSpec, token_ids: Mapping[str, Sequence[int]]) -> Client:
    """How this system is asked."""
    if name == "baton_grpc":
        return GrpcClient(front.grpc_address, MODEL_NAME, spec.timeout_s, token_ids)
    return HttpClient(front.base_url, MODEL_NAME, spec.timeout_s)


async def compare(spec: FrontDoorSpec, against: str, peers_dir: Path | None, sets: Sequence[str]) -> dict[str, Any]:
    """Start, measure, end; the report."""
    machine = environment()
    with contextlib.ExitStack() as keep:
        async with rig(spec.step_ms, sets) as running:
            fronts, left_out = await start_all(running, spec, against, peers_dir or running.folder / "peers", keep)
            if not fronts:
                raise ValueError("nothing to measure: " + "; ".join(left_out.values()))
            visits = await run_rounds(fronts, spec, running.model)
    return report.build(spec, visits, machine, left_out)


def finish(work: Coroutine[None, None, Result]) -> Result:
    """Run it; a stop signal ends it as Ctrl-C does."""
    try:
        return asyncio.run(work)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def front_door(
    *,
    json: Path | None = None,
    against: str = "",
    spec: FrontDoorSpec = _SPEC,
    peers_dir: Path | None = None,
    sets: Annotated[Sequence[str], Parameter(name="--set", metavar="KEY=VALUE")] = (),
) -> int:
    """Compare what front ends cost, interleaved, over fake engines. The exit code says whether every request succeeded.

    Parameters
    ----------
    json
        where the numbers go
    against
        another commit, or a folder with its checkout: compare with that Baton too
    peers_dir
        a folder that has the peers' packages or gets them; default: a new one, removed at the end
    sets
        further settings of `baton up`; may be repeated
    """
    if "earlier" in spec.systems and not against:
        raise ValueError("the system 'earlier' needs --against, a commit or a checkout of it")
    made = finish(compare(spec, against, peers_dir, sets))
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")
    print(report.text(made))
    return 1 if made["errors"] else 0
