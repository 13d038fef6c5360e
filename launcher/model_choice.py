"""Decides which model a cluster serves and refuses a wrong one in a sentence. Reads folders; loads no model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from launcher import demo_model
from launcher.config import BatonConfig
from launcher.demo_model import Progress
from runtime.configuration import DEFAULT

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OFFLINE = {"1", "true", "yes", "on"}


class ModelError(Exception):
    """The model cannot be served; the message is one clear sentence."""


def choose(
    config: BatonConfig, sources: Mapping[str, str], environ: Mapping[str, str], progress: Progress
) -> BatonConfig:
    """``config`` with a model that can be loaded: the one it names, or the demo model when it names none.

    Raises ModelError, or demo_model.DemoModelError when the demo model cannot be made.
    """
    if config.engine.model:
        model = check(config.engine.model, environ, progress)
        engine = msgspec.structs.replace(config.engine, model=model)
        return msgspec.structs.replace(config, engine=_fitting_fake(engine, sources))
    cache_dir = Path(config.launcher.demo_cache_dir) if config.launcher.demo_cache_dir else None
    folder = demo_model.ensure(cache_dir, progress)
    serving = config.front_proxy.serving
    engine = msgspec.structs.replace(
        config.engine,
        model=str(folder),
        served_model_name=config.engine.served_model_name or demo_model.NAME,
        # As it was trained: rounded to 16 bits its logits can tie, and then answers depend on what shares the batch.
        dtype=demo_model.DTYPE if config.engine.dtype == "auto" else config.engine.dtype,
    )
    if sources.get("front_proxy.serving.tool_call_parser", DEFAULT) == DEFAULT:
        serving = msgspec.structs.replace(
            serving, tool_call_parser=demo_model.CHAT_TOOL_PARSER, enable_auto_tool_choice=True
        )
    return msgspec.structs.replace(
        config,
        engine=_fitting_fake(engine, sources),
        front_proxy=msgspec.structs.replace(config.front_proxy, serving=serving),
    )


def check(model: str, environ: Mapping[str, str], progress: Progress) -> str:
    """``model`` as the engines shall get it: an absolute folder, or a hub name."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"the model folder {folder} has no config.json, so it holds no model that can be loaded")
        return str(folder.resolve())
    if folder.exists():
        raise ModelError(f"the model {folder} is a file; name the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(model):
        raise ModelError(f"there is no model folder {model}, and a name on the model hub looks like organisation/name")
    if environ.get("HF_HUB_OFFLINE", "").lower() in _OFFLINE and not _in_hub_cache(model, environ):
        raise ModelError(
            f"there is no folder {model}, and the model hub cannot be asked for it because HF_HUB_OFFLINE is set"
        )
    progress(f"there is no folder {model} here, so it is taken as a name on the model hub")
    return model


def is_local(model: str) -> bool:
    """Whether ``model``, once checked, is a folder on this machine."""
    return Path(model).is_absolute()


def served_name(config: BatonConfig) -> str:
    """The name clients use for the model."""
    names = config.front_proxy.serving.served_model_name
    return (names[0] if names else "") or config.engine.served_model_name or config.engine.model


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


def _in_hub_cache(model: str, environ: Mapping[str, str]) -> bool:
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    return (cache / f"models--{model.replace('/', '--')}").is_dir()
