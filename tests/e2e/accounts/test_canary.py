"""A key is in nothing that a cluster writes or says, whatever fails and whatever a client puts it into."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from protos.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.e2e.accounts import canary
from tests.e2e.accounts.test_accounts import RULES, key
from tests.e2e.cluster import Endpoint, baton_up, wait_for
from tests.e2e.conftest import FAKE, SERVED, Alive

ROLES = ("front_proxy", "scheduler", "worker")


@pytest.fixture(scope="module")
def cluster(alive: Alive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    alive.end()
    folder = tmp_path_factory.mktemp("canary")
    rules = folder / "rules.toml"
    rules.write_text(RULES)
    debug = (f"{role}.log_level=debug" for role in ROLES)
    settings = ("auth.mode=required", "accounts.mode=enforce", f"accounts.rules_file={rules}", *debug)
    words = [word for setting in settings for word in ("--set", setting)]
    with baton_up(folder / "state", [*FAKE, "--front-proxies", "2", "--decode", "2", *words]) as running:
        yield running


def bad_requests(shown: str) -> list[tuple[str, dict[str, Any]]]:
    """Requests that are refused, with the key in each field that a client fills."""
    good: dict[str, Any] = {"model": SERVED, "prompt": "hello", "max_tokens": 4}
    chat: dict[str, Any] = {"model": SERVED, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    tool = {"type": "function", "function": {"name": shown, "parameters": {"type": shown}}}
    bodies: list[tuple[str, Any]] = [
        ("/v1/completions", good | {"model": shown}),
        ("/v1/completions", good | {"prompt": shown, "max_tokens": -1}),
        ("/v1/completions", good | {"max_tokens": shown}),
        ("/v1/completions", good | {"user": shown, "temperature": shown}),
        ("/v1/completions", good | {"stop": [shown] * 100, "n": 0}),
        ("/v1/completions", good | {"kv_transfer_params": {shown: shown}}),
        ("/v1/completions", good | {shown: shown}),
        ("/v1/completions", good | {"structured_outputs": {"regex": f"({shown}"}}),
        ("/v1/completions", good | {"structured_outputs": {"json": shown}}),
        ("/v1/chat/completions", chat | {"messages": [{"role": shown, "content": shown}]}),
        ("/v1/chat/completions", chat | {"tools": [tool], "tool_choice": shown}),
        ("/v1/chat/completions", chat | {"response_format": {"type": shown}}),
        ("/v1/responses", {"model": SERVED, "input": [{"type": shown}], "previous_response_id": shown}),
        ("/v1/messages", {"model": shown, "max_tokens": 4, "messages": [{"role": shown, "content": shown}]}),
        (f"/v1/{shown}", {}),
        (f"/v1/completions?key={shown}", good | {"max_tokens": -1}),
    ]
    asked: list[tuple[str, dict[str, Any]]] = [(path, {"content": json.dumps(body)}) for path, body in bodies]
    asked.append(("/v1/completions", {"content": f'{{"model": "{shown}", '}))
    asked.append(("/v1/chat/completions", {"content": f'"{shown}"'}))
    headers = ("x-request-id", "x-baton-tenant", "x-baton-priority", "x-slo-ttft-ms", "traceparent", "user-agent")
    asked += [("/v1/completions", {"content": json.dumps(good), "headers": {name: shown}}) for name in headers]
    return asked


def ask_badly(cluster: Endpoint, shown: str) -> list[bytes]:
    """What is answered to a client that shows no key, or a wrong one; with the right one it only has its own words."""
    told = []
    wrong = shown[:-1] + ("a" if shown[-1] != "a" else "b")
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        for path, request in bad_requests(shown):
            headers = {"content-type": "application/json", **request.get("headers", {})}
            client.post(path, content=request["content"], headers={**headers, "authorization": f"Bearer {shown}"})
        for name in ("authorization", "x-api-key"):
            for value in (f"Bearer {wrong}", wrong, f"Basic {base64.b64encode(shown.encode()).decode()}", shown * 20):
                answer = client.get("/v1/models", headers={name: value})
                told.append(answer.content + repr(answer.headers).encode())
        told.append(client.get("/v1/models", headers={"authorization": f"Bearer {shown}"}).content)
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        sampling = inference_pb2.SamplingOptions(max_tokens=2, regex=f"({shown}")
        generate = inference_pb2.GenerateRequest(text=shown, request_id=shown, sampling=sampling)
        for value in (f"Bearer {shown}", f"Bearer {wrong}"):
            try:
                list(
                    stub.Generate(generate, metadata=(("authorization", value), ("x-baton-tenant", shown)), timeout=30)
                )
            except grpc.RpcError as error:
                told.append(str(error).encode() if value.endswith(wrong) else b"")
    return told


def test_a_key_is_in_no_output_whatever_fails(cluster: Endpoint) -> None:
    _, shown = key(cluster, "search")
    asked = {"model": SERVED, "prompt": "hello world", "max_tokens": 400, "stream": True}
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                with httpx.Client(headers={"authorization": f"Bearer {shown}"}, timeout=60) as client:
                    client.post(f"{cluster.url}/v1/completions", json=asked)
            except httpx.HTTPError:
                pass  # its front proxy was killed

    users = [threading.Thread(target=ask) for _ in range(8)]
    for user in users:
        user.start()
    answers: list[bytes] = []
    try:
        for name in ("decode-0", "front-proxy-0", "scheduler"):
            answers += ask_badly(cluster, shown)
            line = next(line for line in cluster.status() if line["id"] == name)
            os.kill(int(line["pid"]), signal.SIGKILL)

            def back(name: str = name, pid: int = int(line["pid"])) -> bool:
                lines = cluster.status()
                again = next(line for line in lines if line["id"] == name)
                return again["pid"] != pid and all(line["state"] == "ready" for line in lines)

            wait_for(back, timeout_s=120, what=f"{name} is back", seen=cluster.status)
        answers += ask_badly(cluster, shown)
    finally:
        stop.set()
        for user in users:
            user.join()
    assert "debug" in cluster.logs()
    assert_in_no_output(cluster, shown, answers)


def assert_in_no_output(cluster: Endpoint, shown: str, answers: list[bytes]) -> None:
    addresses = json.loads((cluster.state_dir / "cluster.json").read_text())["processes"]
    scraped = [httpx.get(f"http://{each['metrics_address']}/metrics", timeout=30).content for each in addresses]
    commands = (
        ("keys", "list", "--json"), ("audit", "export"), ("usage", "export"), ("status", "--json"),
        ("usage", "--by", "team,model,key,day", "--cost"),
    )  # fmt: skip
    said = [cluster.command(*words).encode() for words in commands]
    texts = {f"said {place}": text for place, text in enumerate([*scraped, *said])}
    texts |= {f"answer {place}": text for place, text in enumerate(answers)}
    canary.assert_absent([shown], texts)
    canary.assert_in_no_file(cluster.state_dir, [shown])
