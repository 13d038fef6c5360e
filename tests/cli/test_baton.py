"""The `baton` command: what it refuses, where settings come from, and what it does not import."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from cli.app import main
from launcher.config import BatonConfig


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BATON_"):
            monkeypatch.delenv(name)


def test_config_shows_what_differs_and_why_and_all_of_it_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out.startswith("# every setting has its default")
    file = tmp_path / "baton.toml"
    file.write_text("[engine]\nseed = 1\nmax_num_seqs = 2\ndtype = 'float32'\n")
    monkeypatch.setenv("BATON_ENGINE__SEED", "3")
    monkeypatch.setenv("BATON_ENGINE__MAX_NUM_SEQS", "4")
    words = ["config", "--config", str(file), "--set", "engine.seed=5", "--set", "launcher.prefill=1"]
    assert main(words) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f'engine.dtype = "float32"  # file {file}',
        "engine.max_num_seqs = 4  # env BATON_ENGINE__MAX_NUM_SEQS",
        "engine.seed = 5  # --set",
    ]
    assert main([*words, "--all"]) == 0
    assert "launcher.decode = 1  # default" in capsys.readouterr().out


def test_every_tier_that_is_named_is_one_of_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--kv-tier", "host:1GiB", "--kv-tier", "host:2GiB"]) == 2
    assert "kv.tiers: 'host' is there twice; a worker has one (--kv-tier)" in capsys.readouterr().err
    assert main(["up", "--kv-tier", "hots:1GiB"]) == 2
    assert "did you mean 'host'? (--kv-tier)" in capsys.readouterr().err
    assert main(["config", "--set", 'kv.tiers=["host:1GiB"]']) == 0
    assert 'kv.tiers = ["host:1GiB"]  # --set' in capsys.readouterr().out


def test_the_printed_json_is_a_file_that_gives_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--json", "--set", "launcher.decode=3"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "again.json").write_text(first)
    assert main(["config", "--json", "--config", str(tmp_path / "again.json")]) == 0
    assert capsys.readouterr().out == first
    assert main(["config", "--schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["$defs"]["BatonConfig"]["properties"]) == set(json.loads(first))


def test_every_number_of_the_configuration_has_a_bound() -> None:
    def unbounded(cls: type[msgspec.Struct], at: str) -> list[str]:
        found: list[str] = []
        for field in msgspec.structs.fields(cls):
            path = f"{at}{field.name}"
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
                found += unbounded(field.type, f"{path}.")
            elif field.type in (int, float, int | None, float | None):
                found.append(path)
        return found

    # A token id means nothing by its size.
    assert unbounded(BatonConfig, "") == ["engine.fake.eos_token_id"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["up", "--model", "/no/such/folder"], "there is no model folder /no/such/folder"),
        (["up", "--model", __file__], "is a file; name the folder"),
        (["up", "--model", "gpt"], "looks like organisation/name"),
        (["up", "--model", str(Path(__file__).parent)], "has no config.json, so it holds no model that can be loaded"),
        (["status"], "no cluster was started with the state folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_1(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--set", "front_proxy.port=0", "--state-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (
            "up",
            [
                "--model MODEL",
                "--prefill N",
                "--decode M",
                "--front-proxies N",
                "--port P",
                "--grpc-port G",
                "--state-dir DIR",
            ],
        ),
        ("drain", ["WORKER", "--timeout-s S"]),
        ("prefill", ["--id ID", "--scheduler HOST:PORT"]),
        ("chaos", ["--faults KINDS", "--freeze-s", "--roles ROLES", "virtual"]),
    ],
)
def test_help_names_every_option(command: str, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert [each for each in (*told, "--config FILE", "--set KEY=VALUE") if each not in out] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["upp"], 'Unknown command "upp". Did you mean "up"?'),
        (["up", "--prefil", "2"], "Unknown option: --prefil. Did you mean --prefill?"),
        (["up", "--model"], "--model requires an argument"),
        (["up", "--port", "abc"], "front_proxy.port: Expected `int`, got `str` (--port)"),
        (["up", "--decode=0"], "launcher.decode: Expected `int` >= 1 (--decode)"),
        (["restart"], "PROCESS requires an argument"),
        (["status", "extra"], "error: unexpected argument 'extra'\n"),
        (["config", "one", "two"], "error: unexpected arguments 'one', 'two'\n"),
        (["config", "--all", "--json"], "Mutually exclusive arguments: {--all, --json}"),
        (
            ["config", "--set", "front_proxy.tool_call_parser=hermes"],
            "unknown key; did you mean front_proxy.serving.tool_call_parser?",
        ),
        (["config", "--set", "front.port=1"], "did you mean front_proxy.port or"),
        (["config", "--set", "scheduler.wait=1"], "scheduler.wait: unknown key; docs/upgrading.md lists settings"),
        (["config", "--config", "/nowhere.toml"], "cannot read the file"),
        (["config", "--config", "a\udcff"], "error: not UTF-8 text: a\\udcff\n"),
        (["chaos", "--faults", "kill,flood"], "--faults: flood is not one of kill, freeze"),
        (["chaos", "virtual", "--seeds", "x"], '--seeds: unable to convert "x" into int'),
        (["prefill"], "worker.scheduler_address: needs the scheduler's HOST:PORT"),
        (["front-proxy"], "front_proxy.scheduler_address: needs the scheduler's HOST:PORT"),
        (["keys", "create", "--team", "a", "--expires", "0d"], "for --expires. Must be > 0."),
        (
            ["usage", "--last", "nan"],
            "for --last: a time is a number with s, m, h or d behind it, such as 90d, got 'nan'",
        ),
        (
            ["keys", "revoke", "bt-ABCDEFGHIJ" + 38 * "s"],
            "this is a whole key, which is secret; its id is ABCDEFGHIJ",
        ),
        (["engine-node"], "engine.args.node_rank: an engine's further nodes count from 1"),
    ],
)
def test_wrong_words_and_settings_are_one_line_and_exit_code_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("baton: error: ") and told in err
    assert len(err.splitlines()) == 1


def test_service_links_are_told_once_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("BATON_WORKER_PORT", "BATON_FRONT_PROXY_PORT", "VLLM_PORT"):
        monkeypatch.setenv(name, "tcp://10.0.0.2:9000")
    assert main(["config"]) == 0
    names = "BATON_FRONT_PROXY_PORT, BATON_WORKER_PORT, VLLM_PORT"
    assert capsys.readouterr().err == f"baton: ignored what Kubernetes set for its Services: {names}\n"
    assert "VLLM_PORT" not in os.environ
    monkeypatch.setenv("BATON_WORKER_PORT", "9000")
    assert main(["config"]) == 2
    assert "spell it BATON_WORKER__PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["up"], ["prefill", "--scheduler", "h:1"], ["decode", "--scheduler", "h:1"]], ids=lambda it: it[0]
)
def test_what_vllm_would_refuse_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    sets = ["--set", f"launcher.state_dir={tmp_path / 'state'}", "--set", "engine.args.max_num_seqs=3"]
    assert main([*command, *sets]) == 2
    said = capsys.readouterr().err
    assert "engine.args.max_num_seqs: set engine.max_num_seqs instead (--set)" in said
    assert not (tmp_path / "state").exists()
