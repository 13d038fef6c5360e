"""A decode worker whose two tensor-parallel ranks run in two processes, as on two nodes: each pulls its part of the KV.

The processes are started by hand as docs/ray.md says. vLLM computes; both workers have two ranks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import msgspec
import pytest

from engine.epoch import EPOCH_VARIABLE
from launcher.local import procfs, temp_dirs
from launcher.local.child import READY_PREFIX
from tests.contract import tiny_model
from tests.e2e.cluster import BATON, START_TIMEOUT_S, STOP_TIMEOUT_S, metrics, wait_for

OUTPUT_TOKENS = 12
PROMPTS = [random.Random(length).choices(range(10, tiny_model.VOCAB_SIZE), k=length) for length in (70, 200, 333)]
SETS = (
    "engine.served_model_name=tiny", "engine.tensor_parallel_size=2", "engine.dtype=float32",
    "engine.max_model_len=512", "engine.kv_cache_bytes=33554432", "engine.cpu_threads=1",
)  # fmt: skip


class Started:
    """Processes, each with a session of its own. They are killed on leaving."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self._folder, self._environ = folder, environ
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str, sets: tuple[str, ...] = (), epoch: str = "") -> None:
        command = [*BATON, *words, *(word for each in (*SETS, *sets) for word in ("--set", each))]
        environ = {**self._environ, EPOCH_VARIABLE: epoch} if epoch else self._environ
        with (self._folder / name).open("wb") as output:
            self.processes[name] = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )

    def ready(self, name: str) -> dict[str, str]:
        """The addresses that a process says."""

        def line() -> str:
            output = (self._folder / name).read_text(errors="replace")
            assert self.processes[name].poll() is None, output[-4000:]
            return next((each for each in output.splitlines() if each.startswith(READY_PREFIX)), "")

        said = wait_for(line, timeout_s=START_TIMEOUT_S, what=f"{name} is ready")
        return msgspec.json.decode(said.removeprefix(READY_PREFIX), type=dict[str, str])

    def gone(self, name: str) -> bool:
        """Whether nothing is left of a process and of all that it started."""
        return not self._members(name)

    def _members(self, name: str) -> list[int]:
        return [pid for pid in procfs.group_members(self.processes[name].pid) if not procfs.is_resource_tracker(pid)]

    def end(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for name, process in self.processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            for pid in self._members(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    temporary = temp_dirs.make()
    every = Started(tmp_path, temp_dirs.environment(temporary, os.environ))
    yield every
    every.end()
    temp_dirs.remove(temporary)


def of_whole_model(folder: Path) -> list[list[int]]:
    """What the model says in one piece, without vLLM."""
    import torch
    from transformers import LlamaForCausalLM

    model, outputs = LlamaForCausalLM.from_pretrained(folder), []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(OUTPUT_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


def complete(url: str, prompt: list[int]) -> list[int]:
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json={**asked, "return_token_ids": True}, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


@pytest.mark.timeout(900)
def test_each_rank_pulls_its_part_the_tokens_are_right_and_no_rank_outlives_its_process(
    started: Started, tmp_path: Path
) -> None:
    tiny_model.save(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spread = (
        "engine.args.nnodes=2", "engine.args.master_addr=127.0.0.1", f"engine.args.master_port={port}",
        "engine.args.distributed_executor_backend=mp",
    )  # fmt: skip
    model = ("--model", str(tmp_path / "model"))
    started.start("scheduler", "scheduler", "--port", "0")
    to = ("--scheduler", started.ready("scheduler")["address"])
    started.start("prefill", "prefill", "--id", "p", *model, *to)
    started.start("leader", "decode", "--id", "d", *model, *to, sets=(*spread, "engine.args.node_rank=0"), epoch="1")
    started.start("follower", "engine-node", "--id", "d", *model, sets=(*spread, "engine.args.node_rank=1"), epoch="1")
    started.start("front", "front-proxy", "--port", "0", "--grpc-port", "0", *model, *to)
    for name in ("prefill", "follower"):
        started.ready(name)
    decode, url = started.ready("leader"), f"http://{started.ready('front')['address']}"
    assert [complete(url, prompt) for prompt in PROMPTS] == of_whole_model(tmp_path / "model")
    told = metrics(f"http://{decode['metrics_address']}")
    pulls = {name: told[f"baton_worker_pulls_{name}"].samples[0].value for name in ("checked", "wrong", "unproved")}
    # Each rank proves its own.
    assert pulls == {"checked": 2 * len(PROMPTS), "wrong": 0, "unproved": 0}
    # As when what watches a process dies with it: no rank may hold its GPU on.
    for name in ("follower", "leader"):
        started.processes[name].kill()
        started.processes[name].wait()
        wait_for(functools.partial(started.gone, name), timeout_s=STOP_TIMEOUT_S, what=f"nothing of the {name} is left")
