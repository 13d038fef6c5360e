"""Which model a cluster serves."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from front_proxy.config import FrontProxyConfig, ServingConfig
from launcher import model_choice
from launcher.config import BatonConfig, LauncherConfig
from launcher.demo import model as demo_model


def check(model: str, environ: dict[str, str], said: list[str] | None = None, *, hub_timeout_s: float = 5.0) -> str:
    told = said if said is not None else []
    return model_choice.check(model, environ, told.append, hub_timeout_s=hub_timeout_s)


def choose(config: BatonConfig, sources: dict[str, str]) -> BatonConfig:
    return model_choice.choose(config, sources, {}, print)


def test_a_folder_with_a_config_is_taken_as_an_absolute_path_which_must_be_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "model", tmp_path / "a\udcff"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = check("model", {})
    assert found == str(tmp_path / "model")
    assert model_choice.is_local(found)
    monkeypatch.chdir(tmp_path / "a\udcff")
    with pytest.raises(model_choice.ModelError, match="is not UTF-8 text"):
        check(".", {})


@contextmanager
def hub(status: int) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The environment of a model hub that answers everything with ``status``, and the paths it was asked for."""
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        try:
            yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": "/nowhere"}, asked
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize(("status", "known"), [(200, True), (500, True), (401, False), (403, False), (404, False)])
def test_a_hub_name_is_said_to_be_one_and_refused_where_the_hub_does_not_know_it(status: int, known: bool) -> None:
    said: list[str] = []
    refused = pytest.raises(model_choice.ModelError, match="the model hub has no")
    with hub(status) as (environ, asked), nullcontext() if known else refused:
        assert check("some/name", environ, said) == "some/name"
    assert "model hub" in said[0]
    assert asked == ["/some/name/resolve/main/config.json"]


def test_a_token_that_is_not_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff")
    with hub(200) as (environ, asked):
        for token in ({"HF_TOKEN": "a\udcff"}, {"HF_TOKEN_PATH": str(tmp_path / "token")}):
            with pytest.raises(model_choice.ModelError, match="cannot be asked for it"):
                check("some/name", environ | token)
    assert asked == []


def test_a_hub_that_does_not_answer_is_a_sentence_and_no_retries(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_CACHE": str(tmp_path)}
        with pytest.raises(model_choice.ModelError, match="cannot be asked"):
            check("some/name", environ, hub_timeout_s=0.1)


def test_a_hub_name_is_refused_when_the_hub_cannot_be_asked(tmp_path: Path) -> None:
    environ = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    with pytest.raises(model_choice.ModelError, match="HF_HUB_OFFLINE"):
        check("some/name", environ)
    (tmp_path / "models--some--name").mkdir()
    assert check("some/name", environ) == "some/name"


def test_the_fake_engine_knows_as_many_tokens_as_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 777}')
    config = BatonConfig(engine=EngineConfig(kind="fake", model=str(tmp_path)))
    assert choose(config, {}).engine.fake.vocab_size == 777
    kept = choose(config, {"engine.fake.vocab_size": "--set"})
    assert kept.engine.fake.vocab_size == config.engine.fake.vocab_size


def test_without_a_model_the_demo_model_is_served_with_its_own_tool_parser(tmp_path: Path) -> None:
    config = choose(BatonConfig(), {})
    assert config.engine.model == str(demo_model.SHIPPED)
    assert model_choice.served_name(config) == demo_model.NAME
    assert config.front_proxy.serving.tool_call_parser == demo_model.CHAT_TOOL_PARSER
    kept = choose(BatonConfig(), {"front_proxy.serving.tool_call_parser": "--set"})
    assert kept.front_proxy.serving.tool_call_parser is None
    elsewhere = BatonConfig(launcher=LauncherConfig(demo_cache_dir=str(tmp_path)))
    assert Path(choose(elsewhere, {}).engine.model).parent == tmp_path


def test_automatic_tool_choice_without_a_parser_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    serving = ServingConfig(enable_auto_tool_choice=True)
    config = BatonConfig(engine=EngineConfig(model=str(tmp_path)), front_proxy=FrontProxyConfig(serving=serving))
    with pytest.raises(model_choice.ModelError, match=r"needs front_proxy\.serving\.tool_call_parser"):
        choose(config, {})


@pytest.mark.parametrize("source", ["--set", "--model"])
def test_an_empty_model_on_the_command_line_is_no_wish_for_the_demo_model(source: str) -> None:
    with pytest.raises(model_choice.ModelError, match=r"engine\.model"):
        choose(BatonConfig(), {"engine.model": source})
