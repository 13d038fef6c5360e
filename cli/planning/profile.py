"""`baton profile`: measures how fast an engine is on this machine, for `baton plan` and the scheduler."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cli.settings import NO_SOURCES, Model, Sources, StateDir, check_engine, load, state_folder
from runtime.user_error import UserError

if TYPE_CHECKING:
    from bench.profiling.grid import Cell
    from bench.profiling.measure import Measurement
    from bench.profiling.profile_file import Part
    from engine.protocol import Engine
    from launcher.config import BatonConfig

BUSY_MAX = 0.25
"""A machine of whose processor more is used before the engines start is busy."""
BUSY_LOOK_S = 2.0
"""The load average would still have what ended a minute ago."""
BAR = 30


class NotGood(UserError):
    """The profile is written, and its numbers are those of a busy machine."""


def profile(
    *,
    output: Path,
    model: Model = None,
    alone: bool = False,
    force: bool = False,
    live: Annotated[bool, Parameter(negative="")] = False,
    state_dir: StateDir = None,
    sources: Sources = NO_SOURCES,
) -> None:
    """Measure prompts, decode steps and hand-offs of an engine with the settings of this cluster.

    Starts the engine, and a second one for hand-offs. Takes minutes; interrupted, it goes on where it was. Exit code 1:
    the machine was busy, or repetitions differ. The file is there then, and says so.

    Parameters
    ----------
    output
        file for the profile; pictures go beside it, into a file that ends in .html. While it is measured, there is a
        file beside it that ends in .part
    alone
        no hand-offs, which need a second engine
    force
        begin again although what was begun there is of other settings or another machine
    live
        start and measure nothing: write what the running cluster's scheduler has learnt of its workers from their
        steps. What steps do not show is named in the file
    """
    if live:
        _learnt(state_folder(load(sources, state_dir).value), output)
        return
    from launcher import model_choice
    from runtime.process import logs

    loaded = load(sources, model)
    check_engine(loaded, workers=1 if alone else 2)
    logs.configure_logging("warning", "profile")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    tell = functools.partial(print, file=sys.stderr)
    config = model_choice.choose(loaded.value, loaded.sources, os.environ, tell)
    asyncio.run(_profile(config, output, alone=alone, force=force))


def _learnt(state: Path, output: Path) -> None:
    import msgspec

    from launcher.hosted import operator_commands
    from protos.scheduler.v1 import scheduler_pb2 as pb

    report = asyncio.run(operator_commands.tune(state, pb.TUNE_MODE_UNSPECIFIED, with_looks=False))
    found = report.learnt
    if found is None:
        raise UserError("no worker has reported steps with prompts and steps of outputs yet: send some traffic first")
    assert found.learnt is not None
    assert found.measured is not None
    output.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    print(f"{found.fingerprint.model}, {found.fingerprint.engine}: learnt from live traffic")
    for name, kind in (("prompts", found.learnt.prompt_steps), ("outputs", found.learnt.decode_steps)):
        print(f"steps with {name}: {kind.seen} seen, usually {kind.error:.1%} off the law")
    for each in found.learnt.workers:
        print(f"{each.worker_id} ({each.role}): {each.factor:.2f} times the law, usually {each.error:.1%} off")
    print("not told by steps: " + "; ".join(found.learnt.not_told))
    print(output)
    if found.measured.not_good:
        raise NotGood(f"{output} is written, but its numbers are not good: {found.measured.not_good}")


async def _profile(config: BatonConfig, output: Path, *, alone: bool, force: bool) -> None:
    from bench.profiling import grid, profile_file
    from bench.profiling.measure import Measurement
    from simulation.sizing import profile_fit, profile_report

    busy = _busy()
    began_s = time.monotonic()
    async with _engine(config, "profile-1", "prefill") as engine:
        start_s = time.monotonic() - began_s
        print(f"the engine started in {start_s:.0f} s", file=sys.stderr)
        part = profile_file.Part.begin(
            output, profile_file.fingerprint(engine.info, config.engine, _hardware()), force=force
        )
        cells: list[Cell] = [*grid.prefills(engine.info), *grid.decodes(engine.info, config.engine.max_num_seqs)]
        pulls: list[Cell] = [] if alone else [*grid.handoffs(engine.info)]
        await _measure(Measurement(engine, None, random.Random()), part, output, cells)
        if any(not part.has(each) for each in pulls):
            async with _engine(config, "profile-2", "decode") as taker:
                await _measure(Measurement(engine, taker, random.Random()), part, output, pulls)
        found = profile_file.whole(
            part, engine.info, config.engine, requests_max=config.worker.requests_max, start_s=start_s, busy=busy
        )
    part.finish(output, found)
    said, picture = profile_file.sentences(found), output.with_suffix(".html")
    picture.write_text(profile_report.page(found, profile_fit.model_of(found, output), said))
    print("\n".join([*said, f"{output}; pictures: {picture}"]))
    assert found.measured is not None
    if found.measured.not_good:
        raise NotGood(f"{output} is written, but its numbers are not good: {found.measured.not_good}")


async def _measure(measurement: Measurement, part: Part, output: Path, cells: list[Cell]) -> None:
    """Measure what is not measured yet, with a bar and the time left."""
    left = [each for each in cells if not part.has(each)]
    began_s = time.monotonic()
    for done, cell in enumerate(left):
        passed_s = time.monotonic() - began_s
        rest = f", about {passed_s / done * (len(left) - done):.0f} s left" if done else ""
        full = BAR * (len(cells) - len(left) + done) // len(cells)
        told = f"[{'#' * full:<{BAR}}] {type(cell).__name__.lower()} {done + 1}/{len(left)}{rest}"
        print(f"\r{told:<100}", end="", file=sys.stderr, flush=True)
        part.add(output, cell, await measurement.run(cell))
    print(file=sys.stderr)


@asynccontextmanager
async def _engine(config: BatonConfig, name: str, role: str) -> AsyncIterator[Engine]:
    from engine import factory

    engine = await factory.start(config.engine, worker_id=name, role="prefill" if role == "prefill" else "decode")
    try:
        yield engine
    finally:
        await engine.close()


def _busy() -> str:
    import psutil

    share = psutil.cpu_percent(interval=BUSY_LOOK_S) / 100.0
    return f"{share:.0%} of the processor was in use before it began" if share > BUSY_MAX else ""


def _hardware() -> str:
    """The accelerator, or the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}"
    cpus = Path("/proc/cpuinfo")
    names = [line for line in cpus.read_text().splitlines() if line.startswith("model name")] if cpus.exists() else []
    return f"{os.cpu_count()} x {names[0].split(':', 1)[1].strip()}" if names else f"{os.cpu_count()} cores"
