"""The command flamegraph: where a front proxy and a scheduler spend their time under the load of the benchmark."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bench.front_door.client import HttpClient
from bench.front_door.measure import LONG_TOKENS, SHORT_TOKENS, FrontDoorSpec
from bench.front_door.run import finish, rig
from bench.front_door.systems import MODEL_NAME, start_baton
from bench.prompts import make_prompts, token_counter
from runtime.user_error import UserError

Form = Literal["flamegraph", "raw", "speedscope"]
_SUFFIX = {"flamegraph": "svg", "raw": "txt", "speedscope": "json"}
# Samples a second: a front proxy that is not busy holds the GIL in few of them.
_RATE = "250"
# What py-spy may take beyond the time it samples, to begin and to write.
_WRITE_TIMEOUT_S = 60.0


def sampler() -> str:
    """The program that samples. Raises UserError where it is not installed."""
    beside = Path(sys.executable).with_name("py-spy")
    if found := (str(beside) if beside.is_file() else shutil.which("py-spy")):
        return found
    raise UserError("py-spy is not installed: pip install --no-deps -r requirements/dev.txt")


def sampler_argv(program: str, pid: int, seconds: int, form: Form, output: Path) -> list[str]:
    """Sample what holds the GIL: threads that wait cost nothing."""
    argv = [program, "record", "--pid", str(pid), "--duration", str(seconds), "--rate", _RATE, "--gil"]
    return [*argv, "--format", form, "--output", str(output)]


async def profile(folder: Path, seconds: int, form: Form, *, spec: FrontDoorSpec, sets: Sequence[str]) -> list[Path]:
    """Sample both processes while clients ask; the files that were written."""
    program = sampler()
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    async with rig(spec.step_ms, sets) as running:
        front = await start_baton(running, "baton")
        prompts = make_prompts(
            requests=4 * spec.in_flight, tokens=spec.prompt_tokens, seed=spec.seed, count=token_counter(running.model)
        )
        client = HttpClient(front.base_url, MODEL_NAME, spec.timeout_s)
        await client.run(prompts, output_tokens=SHORT_TOKENS, in_flight=spec.in_flight)
        outputs = {name: folder / f"{name}.{_SUFFIX[form]}" for name in ("front_proxy", "scheduler")}
        pids = {"front_proxy": front.pid, "scheduler": front.pids["scheduler"]}
        samplers = [
            await running.start(f"py-spy {name}", sampler_argv(program, pids[name], seconds, form, output), {})
            for name, output in outputs.items()
        ]
        ends = asyncio.gather(*(one.wait_end(seconds + _WRITE_TIMEOUT_S) for one in samplers))
        while not ends.done():
            # As the benchmark does: short answers, then long ones, of which there are half as many.
            await client.run(prompts, output_tokens=SHORT_TOKENS, in_flight=spec.in_flight)
            await client.run(prompts[: spec.in_flight], output_tokens=LONG_TOKENS, in_flight=spec.in_flight)
        for one, (code, log) in zip(samplers, await ends, strict=True):
            if code != 0:
                raise UserError(why_refused(one.name, log))
    return [*outputs.values()]


def why_refused(name: str, log: str) -> str:
    """What to tell when the sampler failed."""
    if any(words in log.lower() for words in ("permission denied", "not permitted")):
        return (
            f"{name}: this machine does not let one process look into another (ptrace). Run it as root, or give the "
            "container CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope to 0"
        )
    return f"{name} failed: {log.strip()[-1000:]}"


_SPEC = FrontDoorSpec()


def flamegraph(
    *,
    folder: Path = Path("build/flames"),
    seconds: int = 20,
    form: Annotated[Form, Parameter(name="--format")] = "flamegraph",
    step_ms: float = _SPEC.step_ms,
    in_flight: int = _SPEC.in_flight,
    sets: Annotated[Sequence[str], Parameter(name="--set", metavar="KEY=VALUE")] = (),
) -> None:
    """Leave a flame graph of Baton's front proxy and of its scheduler under the load of front-door.

    Parameters
    ----------
    folder
        where they go
    seconds
        how long to sample
    form
        what py-spy writes
    step_ms
        what an engine takes for one token of every running request
    in_flight
        requests at once
    sets
        further settings of `baton up`; may be repeated
    """
    spec = FrontDoorSpec(step_ms=step_ms, in_flight=in_flight)
    for path in finish(profile(folder, seconds, form, spec=spec, sets=sets)):
        print(path)
