"""Decides which model a cluster serves and refuses a wrong one in a sentence. Reads folders; loads no model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from launcher.config import BatonConfig
from launcher.demo import model as demo_model
from runtime.configuration import COMMAND_LINE, DEFAULT
from runtime.text import is_text
from runtime.user_error import UserError

Progress = Callable[[str], None]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_YES = {"1", "true", "yes", "on"}
_HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 10.0
"""Time that the model hub has to say whether it knows the model, before any process starts."""


class ModelError(UserError):
    """The model cannot be served; the message is one clear sentence."""


def choose(
    config: BatonConfig, sources: Mapping[str, str], environ: Mapping[str, str], progress: Progress
) -> BatonConfig:
    """``config`` with a model that can be loaded: the one it names, or the demo model when it names none.

    Raises ModelError, or demo_model.DemoModelError when the demo model cannot be put where it shall lie.
    """
    if config.engine.model:
        if config.front_proxy.serving.enable_auto_tool_choice and not config.front_proxy.serving.tool_call_parser:
            raise ModelError(
                "front_proxy.serving.enable_auto_tool_choice needs front_proxy.serving.tool_call_parser; "
                "the parser that fits the model is enough"
            )
        model = check(config.engine.model, environ, progress, hub_timeout_s=HUB_TIMEOUT_S)
        engine = msgspec.structs.replace(config.engine, model=model)
        return msgspec.structs.replace(config, engine=_fitting_fake(engine, sources))
    if sources.get("engine.model") in (COMMAND_LINE, "--model"):
        # An unset variable on the command line, and not the wish for the demo model. A file may spell the default.
        raise ModelError("engine.model (--model) is empty; leave it out for the demo model")
    cache_dir = Path(config.launcher.demo_cache_dir) if config.launcher.demo_cache_dir else None
    folder = demo_model.ensure(cache_dir)
    serving = config.front_proxy.serving
    engine = msgspec.structs.replace(
        config.engine,
        model=_text_of(folder),
        served_model_name=config.engine.served_model_name or demo_model.NAME,
        # With logits of 16 bits two tokens can tie, and then answers depend on what shares the batch.
        dtype=demo_model.DTYPE if config.engine.dtype == "auto" else config.engine.dtype,
    )
    if sources.get("front_proxy.serving.tool_call_parser", DEFAULT) == DEFAULT:
        serving = msgspec.structs.replace(serving, tool_call_parser=demo_model.CHAT_TOOL_PARSER)
    return msgspec.structs.replace(
        config,
        engine=_fitting_fake(engine, sources),
        front_proxy=msgspec.structs.replace(config.front_proxy, serving=serving),
    )


def check(model: str, environ: Mapping[str, str], progress: Progress, *, hub_timeout_s: float) -> str:
    """``model`` as the engines shall get it: an absolute folder, or a name that the hub or its cache knows."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"the model folder {folder} has no config.json, so it holds no model that can be loaded")
        return _text_of(folder.resolve())
    if folder.exists():
        raise ModelError(f"the model {folder} is a file; name the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(model):
        raise ModelError(f"there is no model folder {model}, and a name on the model hub looks like organisation/name")
    if environ.get("HF_HUB_OFFLINE", "").lower() in _YES and not _in_hub_cache(model, environ):
        raise ModelError(
            f"there is no folder {model}, and the model hub cannot be asked for it because HF_HUB_OFFLINE is set"
        )
    progress(f"there is no folder {model} here, so it is taken as a name on the model hub")
    if not _in_hub_cache(model, environ) and environ.get("VLLM_USE_MODELSCOPE", "").lower() not in _YES:
        _ask_hub(model, environ, hub_timeout_s)
    return model


def _text_of(folder: Path) -> str:
    if not is_text(str(folder)):
        raise ModelError(f"the name of the model folder {folder} is not UTF-8 text")
    return str(folder)


def is_local(model: str) -> bool:
    """Whether ``model``, once checked, is a folder on this machine."""
    return Path(model).is_absolute()


def served_name(config: BatonConfig) -> str:
    """The name clients use for the model."""
    return config.engine.served_model_name or config.engine.model


def _fitting_fake(engine: EngineConfig, sources: Mapping[str, str]) -> EngineConfig:
    """``engine`` with the fake engine's vocabulary as large as the tokenizer's, unless the operator set it."""
    if engine.kind != "fake" or not is_local(engine.model):
        return engine
    try:
        about = json.loads((Path(engine.model) / "config.json").read_bytes())
    except ValueError as error:
        raise ModelError(f"{engine.model}/config.json is not valid JSON: {error}") from error
    size = about.get("vocab_size") if isinstance(about, dict) else None
    if not isinstance(size, int) or sources.get("engine.fake.vocab_size", DEFAULT) != DEFAULT:
        return engine
    return msgspec.structs.replace(engine, fake=msgspec.structs.replace(engine.fake, vocab_size=size))


def _ask_hub(model: str, environ: Mapping[str, str], timeout_s: float) -> None:
    """Look up the model's config.json once: the engines' libraries would retry for minutes, in every process.

    Raises ModelError where the hub does not know it or does not answer.
    """
    # Here, so that a start without a hub's model does not pay for it.
    import httpx

    token = environ.get("HF_TOKEN") or _stored_token(environ)
    try:
        reply = httpx.head(
            f"{environ.get('HF_ENDPOINT') or _HUB}/{model}/resolve/main/config.json",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_s,
            follow_redirects=True,
        )
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeEncodeError) as error:
        raise ModelError(f"there is no folder {model}, and the model hub cannot be asked for it: {error}") from error
    match reply.status_code:
        case 404:
            raise ModelError(f"there is no folder {model}, and the model hub has no such model")
        case 401 | 403:
            raise ModelError(f"the model hub has no model {model}, or no token (HF_TOKEN) that was found here opens it")
        case _:
            return


def _in_hub_cache(model: str, environ: Mapping[str, str]) -> bool:
    cache = Path(environ.get("HF_HUB_CACHE") or _hub_home(environ) / "hub")
    return (cache / f"models--{model.replace('/', '--')}").is_dir()


def _stored_token(environ: Mapping[str, str]) -> str:
    """What `hf auth login` left; empty when nothing did."""
    try:
        return Path(environ.get("HF_TOKEN_PATH") or _hub_home(environ) / "token").read_text(errors="replace").strip()
    except OSError:
        return ""


def _hub_home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
