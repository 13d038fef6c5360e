"""``engine.args`` as vLLM's own argument parser reads them, for engines and front proxies alike. Starts nothing."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, raising where it would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parsed(args: Mapping[str, Any]) -> dict[str, Any]:
    """Each argument with the type that `vllm serve` gives it: an object becomes vLLM's class. Raises ValueError.

    The message names the argument. Numbers, truth values and lists are taken as they are.
    """
    known = AsyncEngineArgs.__dataclass_fields__
    for name in args:
        if name not in known:
            near = "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(name, known, n=1))
            raise ValueError(f"engine.args.{name}: vLLM has no such engine argument{near}")
    if not any(isinstance(value, dict | str) for value in args.values()):
        return dict(args)
    parser = AsyncEngineArgs.add_cli_args(_Parser(add_help=False))
    return {name: _parsed(parser, name, value) for name, value in args.items()}


def _parsed(parser: _Parser, name: str, value: Any) -> Any:
    flag = f"--{name.replace('_', '-')}"
    if not isinstance(value, dict | str) or flag not in parser._option_string_actions:
        # EngineArgs itself makes the classes of what has no flag.
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return getattr(parser.parse_args([f"{flag}={text}"]), name)
    except (TypeError, ValueError) as error:
        reason = " ".join(re.sub(r"^argument \S+: ", "", str(error)).split())
        raise ValueError(f"engine.args.{name}: {reason}") from error
