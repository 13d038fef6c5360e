"""What is read from other projects' clients, and what is said of one that is not there."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import compatibility
from bench.compatibility import CLIENTS, Target
from launcher.demo import model as demo_model


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target("http://127.0.0.1:1", "m", demo_model.SHIPPED, 1, tmp_path)


def test_each_trial_of_a_client_is_a_row(target: Target) -> None:
    printed = 'noise\n{"what": "chat", "said": ""}\n{"what": "tools", "said": "KeyError: x"}\n'
    assert CLIENTS["openai"].judge(target, printed) == [("chat", ""), ("tools", "KeyError: x")]
    with pytest.raises(AssertionError, match="no result"):
        CLIENTS["openai"].judge(target, "noise")


def test_a_benchmark_with_one_failed_request_has_not_worked(target: Target) -> None:
    totals = [{"successful": 3, "errored": 0}, {"successful": 2, "errored": 1}]
    benchmarks = [{"metrics": {"request_totals": each}} for each in totals]
    (target.folder / "benchmarks.json").write_text(json.dumps({"benchmarks": benchmarks}))
    assert [row.said for row in CLIENTS["guidellm"].judge(target, "")] == ["1 more failed"]
    (target.folder / "benchmarks.json").write_text(json.dumps({"benchmarks": benchmarks[:1]}))
    assert [row.said for row in CLIENTS["guidellm"].judge(target, "")] == [""]


def test_the_tasks_for_lm_eval_ask_what_the_demo_model_knows(target: Target) -> None:
    CLIENTS["lm-eval"].command(target, "python")
    documents = [json.loads(line) for line in (target.folder / "questions.jsonl").read_text().splitlines()]
    assert len(documents) == 20
    assert documents[0]["choices"][0].startswith("Prefill reads")
    assert all(len(set(document["choices"])) == 4 for document in documents)


@pytest.fixture
def server() -> Iterator[str]:
    class Models(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m"}]}')

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Models) as listening:
        serving = threading.Thread(target=listening.serve_forever, args=(0.01,))
        serving.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        serving.join()


def test_a_client_that_is_not_installed_is_said_and_installs_nothing(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compatibility.check(base_url=server, environments=tmp_path, clients=["openai", "lm-eval"]) == 1
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2 and all("--install makes it" in row for row in rows)
    assert list(tmp_path.iterdir()) == []
