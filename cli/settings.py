"""The options that stand for settings, and the configuration that they give together with its other sources."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token

if TYPE_CHECKING:
    from launcher.config import BatonConfig
    from runtime.configuration import Loaded


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where settings come from, beside the environment."""

    config: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """TOML or JSON file with settings"""
    sets: Annotated[Sequence[str], Parameter(name="--set", metavar="KEY=VALUE")] = field(default_factory=list)
    """one setting; may be repeated"""


NO_SOURCES = Sources()

# The option as it was typed, and `path=text`, which the configuration checks.
Given = tuple[str, str]


def setting(path: str, meaning: str, metavar: str) -> Parameter:
    """An option that is short for one setting."""

    def convert(_: Any, tokens: Sequence[Token]) -> Given:
        return tokens[0].keyword or "", f"{path}={tokens[0].value}"

    return Parameter(converter=convert, n_tokens=1, help=f"{meaning} [{path}]", metavar=metavar)


Model = Annotated[
    Given | None, setting("engine.model", "folder or hub name of the model (default: a small demo model)", "MODEL")
]
StateDir = Annotated[Given | None, setting("launcher.state_dir", "folder for state and logs", "DIR")]
FrontHost = Annotated[Given | None, setting("front_proxy.host", "address to listen on", "H")]
FrontPort = Annotated[Given | None, setting("front_proxy.port", "HTTP port; 0: any free one", "P")]
KvTiers = Annotated[
    Sequence[str],
    Parameter(
        name="--kv-tier",
        metavar="KIND:PLACE:SIZE",
        help="keep KV that leaves the engines' memory, as in host:2GiB; may be repeated, from near to far [kv.tiers]",
    ),
]
FrontGrpcPort = Annotated[Given | None, setting("front_proxy.grpc_port", "gRPC port; 0: any free one", "G")]


def kv_tiers(given: Sequence[str]) -> Given | None:
    """``--kv-tier``, as often as it was given, as one setting."""
    return ("--kv-tier", f"kv.tiers={json.dumps(list(given))}") if given else None


def load(sources: Sources, *options: Given | None) -> Loaded[BatonConfig]:
    """The configuration from every source; options win. Raises BadConfiguration."""
    from launcher.config import BatonConfig
    from runtime.configuration import load

    _forget_service_links()
    given = [option for option in options if option is not None]
    return load(BatonConfig, file=sources.config, environ=os.environ, sets=sources.sets, options=given)


def _forget_service_links() -> None:
    """Take what Kubernetes set for Services out of the environment: vLLM would take VLLM_PORT for its own, too."""
    from runtime import service_links

    if found := service_links.found_in(os.environ, ("BATON_", "VLLM_")):
        print(f"baton: ignored what Kubernetes set for its Services: {', '.join(found)}", file=sys.stderr)
    for name in found:
        del os.environ[name]


def check_engine(loaded: Loaded[BatonConfig], *, workers: int = 1) -> None:
    """Raise BadConfiguration for what vLLM would refuse after a long start, of so many workers on this machine."""
    from engine import preflight
    from runtime.configuration import BadConfiguration, source_of

    config = loaded.value
    found = preflight.objection(config.engine, os.environ)
    found = found or preflight.tier_objection(config.engine, config.kv, workers)
    if found is not None:
        raise BadConfiguration(found.path, found.reason, source_of(loaded, found.path))


def state_folder(config: BatonConfig) -> Path:
    """The folder with the state of the cluster."""
    return Path(config.launcher.state_dir).expanduser().absolute()
