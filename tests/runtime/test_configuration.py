"""Configuration: which source wins, what is remembered, and what a mistake is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import configuration
from runtime.configuration import BadConfiguration, Loaded


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    model: str = ""
    context_tokens_max: int | None = None
    backends: list[str] = msgspec.field(default_factory=lambda: ["UCX"])
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    eager: bool = False

    def __post_init__(self) -> None:
        if self.eager and self.model == "compiled":
            raise ValueError("eager cannot be combined with this model")


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    engine: Engine = Engine()
    timeout_s: float = 1.0


def load(*sets: str, file: Path | None = None, environ: dict[str, str] | None = None) -> Loaded[Tree]:
    return configuration.load(Tree, file=file, environ=environ or {}, sets=sets)


def test_a_setting_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "baton.toml"
    file.write_text('timeout_s = 2\n[engine]\nmodel = "file"\ncontext_tokens_max = 10\nbackends = ["POSIX"]\n')
    environ = {"BATON_ENGINE__MODEL": "env", "BATON_ENGINE__CONTEXT_TOKENS_MAX": "20"}
    loaded = load("engine.model=set", file=file, environ=environ)
    assert loaded.value.engine == Engine(model="set", context_tokens_max=20, backends=["POSIX"])
    assert loaded.value.timeout_s == 2.0
    assert loaded.sources["engine.model"] == "--set"
    assert loaded.sources["engine.context_tokens_max"] == "env BATON_ENGINE__CONTEXT_TOKENS_MAX"
    assert loaded.sources["engine.backends"] == f"file {file}"
    assert loaded.sources["engine.eager"] == "default"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("engine.eager=true", Engine(eager=True)),
        ("engine.context_tokens_max=null", Engine()),
        ('engine.backends=["A", "B"]', Engine(backends=["A", "B"])),
        ("engine.args.seed=4", Engine(args={"seed": 4})),
        ("engine.args.rope.type=yarn", Engine(args={"rope": {"type": "yarn"}})),
        ('engine.args={"seed": 4}', Engine(args={"seed": 4})),
        ("engine.model=8000", Engine(model="8000")),
        ("engine.model=a=b", Engine(model="a=b")),
    ],
)
def test_text_is_read_by_the_type_of_its_key(setting: str, expected: Engine) -> None:
    assert load(setting).value.engine == expected


@pytest.mark.parametrize(
    ("setting", "path", "reason"),
    [
        ("engine.mdel=x", "engine.mdel", "did you mean engine.model"),
        ("model=x", "model", "did you mean engine.model?"),
        ("motor.model=x", "motor", "did you mean engine.model?"),
        ("engine.timeout_s=1", "engine.timeout_s", "docs/upgrading.md lists settings that are gone; `baton config"),
        ("engines=1", "engines", "docs/upgrading.md lists settings that are gone"),
        ("engine.context_tokens_max=many", "engine.context_tokens_max", "Expected `int | null`"),
        ("engine=x", "engine", "is a table"),
        ("timeout_s.x=1", "timeout_s.x", "is a value, not a table"),
        ("timeout_s", "timeout_s", "expected key=value"),
    ],
)
def test_a_mistake_names_its_path_and_its_source(setting: str, path: str, reason: str) -> None:
    with pytest.raises(BadConfiguration) as raised:
        load(setting)
    assert raised.value.path == path
    assert reason in raised.value.reason
    assert raised.value.source == "--set"
    assert path in str(raised.value)


def test_an_unknown_key_in_a_file_or_the_environment_is_an_error_too(tmp_path: Path) -> None:
    file = tmp_path / "baton.json"
    file.write_text('{"engine": {"modle": "x"}}')
    with pytest.raises(BadConfiguration, match=r"engine\.modle.*engine\.model"):
        load(file=file)
    with pytest.raises(BadConfiguration, match=r"engine\.modle.*BATON_ENGINE__MODLE"):
        load(environ={"BATON_ENGINE__MODLE": "x"})


def test_a_key_in_the_environment_with_too_few_underscores_is_an_error_that_spells_it() -> None:
    with pytest.raises(BadConfiguration, match=r"engine\.model.*BATON_ENGINE__MODEL"):
        load(environ={"BATON_ENGINE_MODEL": "x"})


def test_other_programs_variables_with_the_same_prefix_are_left_alone() -> None:
    assert load(environ={"BATON_HOME": "x", "BATON_ENGINE": "x", "PATH": "x"}).value == Tree()


def test_what_kubernetes_sets_for_a_service_is_no_setting() -> None:
    links = {"BATON_ENGINE_MODEL_PORT": "tcp://10.0.0.2:9000", "BATON_ENGINE__A_PORT": "tcp://10.0.0.2:9000"}
    assert load(environ=links).value == Tree()
    with pytest.raises(BadConfiguration, match="unknown key"):
        load(environ={"BATON_ENGINE__A_PORT": "9000"})


# A lone surrogate is what Python makes of a byte that is not UTF-8.
@pytest.mark.parametrize("setting", ["engine.model=a\udcff", "engine.args.a\udcff=1", 'engine.args={"a": ["\\ud800"]}'])
def test_what_is_not_text_is_refused_from_every_source(setting: str, tmp_path: Path) -> None:
    key, _, value = setting.partition("=")
    with pytest.raises(BadConfiguration, match="is not UTF-8 text"):
        load(setting)
    with pytest.raises(BadConfiguration, match="is not UTF-8 text"):
        load(environ={f"BATON_{key.replace('.', '__')}": value})
    (tmp_path / "baton.json").write_text(json.dumps({"engine": {"args": {value: "\ud800"}}}))
    with pytest.raises(BadConfiguration, match="is not UTF-8 text"):
        load(file=tmp_path / "baton.json")


def test_a_combination_that_a_struct_refuses_is_told_with_its_path_and_sources() -> None:
    with pytest.raises(BadConfiguration) as raised:
        load("engine.eager=true", environ={"BATON_ENGINE__MODEL": "compiled"})
    assert raised.value.path == "engine"
    assert raised.value.reason == "eager cannot be combined with this model"
    assert "--set" in raised.value.source
    assert "BATON_ENGINE__MODEL" in raised.value.source


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.toml", b"x = = 1", "not valid TOML"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"[]", "must be a table"),
        ("a.toml", b"engine = 1", "expected a table"),
        ("a.toml", b'engine.model = "\xff"', "not valid TOML"),
        ("a.json", b'{"engine": {"model": "\xff"}}', "not valid JSON"),
        ("none.toml", None, "cannot read the file"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_clear_sentence(
    tmp_path: Path, name: str, content: bytes | None, why: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadConfiguration, match=f"{why}.*{name}"):
        load(file=tmp_path / name)


@given(st.text(max_size=20), st.none() | st.integers(0, 2**40), st.lists(st.text(max_size=5)), st.booleans())
def test_what_dump_writes_load_reads_back(model: str, context: int | None, backends: list[str], eager: bool) -> None:
    engine = Engine(model=model, context_tokens_max=context, backends=backends, eager=eager, args={"a": {"b": [1]}})
    dumped = configuration.dump(Tree(engine=engine))
    assert msgspec.convert(json.loads(dumped), Tree) == Tree(engine=engine)


def test_settings_list_every_value_once_with_its_source() -> None:
    rows = configuration.settings(load("engine.args.seed=4", "timeout_s=3"))
    assert [(row.path, row.value, row.source) for row in rows] == [
        ("engine.model", "", "default"),
        ("engine.context_tokens_max", None, "default"),
        ("engine.backends", ["UCX"], "default"),
        ("engine.args.seed", 4, "--set"),
        ("engine.eager", False, "default"),
        ("timeout_s", 3.0, "--set"),
    ]
