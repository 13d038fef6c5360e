"""The `baton` command: what it refuses, where settings come from, and what it does not import."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from cli.app import app, main
from launcher.config import BatonConfig


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BATON_"):
            monkeypatch.delenv(name)


def test_each_setting_comes_from_the_strongest_source_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "baton.toml"
    file.write_text("[engine]\nseed = 1\nmax_num_seqs = 2\ndtype = 'float32'\n")
    monkeypatch.setenv("BATON_ENGINE__SEED", "3")
    monkeypatch.setenv("BATON_ENGINE__MAX_NUM_SEQS", "4")
    assert main(["config", "--all", "--config", str(file), "--set", "engine.seed=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "engine.seed = 5  # --set" in lines
    assert "engine.max_num_seqs = 4  # env BATON_ENGINE__MAX_NUM_SEQS" in lines
    assert f'engine.dtype = "float32"  # file {file}' in lines
    assert "launcher.prefill = 1  # default" in lines


def test_the_printed_json_is_a_file_that_gives_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--json", "--set", "launcher.decode=3"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "again.json").write_text(first)
    assert main(["config", "--json", "--config", str(tmp_path / "again.json")]) == 0
    assert capsys.readouterr().out == first


def test_the_schema_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    sections = json.loads(capsys.readouterr().out)["$defs"]["BatonConfig"]["properties"]
    assert {"engine", "scheduler", "worker", "prefill_worker", "decode_worker", "front_proxy", "launcher"} == set(
        sections
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["config", "--set", "engine.modell=x"], "engine.modell: unknown key; did you mean engine.model?"),
        (
            ["config", "--set", "front_proxy.tool_call_parser=hermes"],
            "unknown key; did you mean front_proxy.serving.tool_call_parser?",
        ),
        (["config", "--set", "front.port=1"], "did you mean front_proxy.port or"),
        (["config", "--set", "scheduler.wait=1"], "scheduler.wait: unknown key; docs/upgrading.md lists settings"),
        (
            ["config", "--set", "engine.lease_duration_s=1"],
            "unknown key; docs/upgrading.md lists",
        ),
        (["config", "--set", "front_proxy.retry_after_s=1"], "unknown key; docs/upgrading.md lists"),
        (["config", "--set", "worker.load_interval_s=1"], "unknown key; docs/upgrading.md lists"),
        (["config", "--set", "decode_worker.holders_max=1"], "unknown key; docs/upgrading.md lists"),
        (["config", "--set", "engine.seed"], "expected key=value"),
        (["up", "--decode", "0"], "launcher.decode: Expected `int` >= 1"),
        (["up", "--decode", "many"], "launcher.decode: Expected `int`"),
        (["up", "--port", "abc"], "front_proxy.port: Expected `int`, got `str` (--port)"),
        (["up", "--prefill=two"], "launcher.prefill: Expected `int`, got `str` (--prefill)"),
        (["drain", "d0", "--timeout-s", "abc"], "worker.drain_timeout_s: Expected `float`, got `str` (--timeout-s)"),
        (["config", "--config", "/nowhere.toml"], "cannot read the file"),
    ],
)
def test_a_wrong_setting_is_an_error_with_its_path(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1


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
    ("model", "told"),
    [
        ("/no/such/folder", "there is no model folder /no/such/folder"),
        (__file__, "is a file; name the folder"),
        ("gpt", "looks like organisation/name"),
        (str(Path(__file__).parent), "has no config.json, so it holds no model that can be loaded"),
    ],
)
def test_a_wrong_model_is_one_sentence(
    model: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "--model", model, "--port", "0", "--state-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


def test_status_without_a_cluster_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--state-dir", str(tmp_path)]) == 1
    assert "no cluster was started with the state folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("up", ["--model MODEL", "--prefill N", "--decode M", "--port P", "--grpc-port G", "--state-dir DIR"]),
        ("status", ["--state-dir DIR", "--json"]),
        ("drain", ["WORKER", "--timeout-s S"]),
        ("restart", ["PROCESS"]),
        ("scheduler", ["--host H", "--port P"]),
        ("prefill", ["--id ID", "--scheduler HOST:PORT"]),
        ("decode", ["--id ID", "--scheduler HOST:PORT"]),
        ("front-proxy", ["--grpc-port G", "--scheduler HOST:PORT"]),
        ("chaos", ["--faults KINDS", "--freeze-s", "--roles ROLES", "virtual"]),
        ("config", ["--all", "--json", "--schema"]),
    ],
)
def test_help_names_every_option(command: str, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    further = ["--config FILE", "--set KEY=VALUE"]
    assert [each for each in (*told, *further) if each not in out] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["upp"], 'Unknown command "upp". Did you mean "up"?'),
        (["up", "--prefil", "2"], "Unknown option: --prefil. Did you mean --prefill?"),
        (["up", "--model"], "--model requires an argument"),
        (["restart"], "PROCESS requires an argument"),
        (["status", "extra"], "error: unexpected argument 'extra'\n"),
        (["config", "one", "two"], "error: unexpected arguments 'one', 'two'\n"),
        (["config", "--all", "--json"], "Mutually exclusive arguments: {--all, --json}"),
        (["chaos", "--faults", "kill,flood"], "--faults: flood is not one of kill, freeze"),
        (["chaos", "virtual", "--seeds", "x"], '--seeds: unable to convert "x" into int'),
        (["prefill"], "worker.scheduler_address: needs the scheduler's HOST:PORT"),
        (["front-proxy"], "front_proxy.scheduler_address: needs the scheduler's HOST:PORT"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("baton: error: ") and told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["up", "--model", "a\udcff"],
        ["status", "--state-dir", "a\udcff"],
        ["config", "--config", "a\udcff"],
        ["a\udcff"],
    ],
)
def test_an_argument_that_is_not_text_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == "baton: error: not UTF-8 text: a\\udcff\n"


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


def test_config_shows_what_differs_and_all_of_it_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--set", "launcher.decode=3", "--set", "launcher.prefill=1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["launcher.decode = 3  # --set"]
    assert main(["config"]) == 0
    assert capsys.readouterr().out.startswith("# every setting has its default")
    assert main(["config", "--all"]) == 0
    assert "launcher.prefill = 1  # default" in capsys.readouterr().out


def test_shells_complete_commands_and_options() -> None:
    script = app.generate_completion(shell="bash")
    assert "front-proxy" in script and "--state-dir" in script and "--blackhole-s" in script


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
