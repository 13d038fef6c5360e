"""What every command of the project shares: how it is parsed, how an error looks, and which exit code it has."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter, Token, UnusedCliTokensError

from runtime.process.exit_codes import ExitCode
from runtime.text import is_text, readable
from runtime.user_error import UserError


def new_app(name: str, text: str, *, version: Callable[[], str] | None = None) -> App:
    """A command whose switches have no `--no-` twin."""
    return App(
        name=name,
        help=text,
        version=version,
        version_flags=("--version",) if version is not None else (),
        default_parameter=Parameter(negative=(), show_default=_default),
        suppress_keyboard_interrupt=False,
    )


def run(app: App, words: Sequence[str] | None) -> int:
    """Do what ``words`` say (None: the process's own arguments); returns the exit code."""
    given = list(sys.argv[1:] if words is None else words)
    if odd := [readable(word) for word in given if not is_text(word)]:
        return fail(app, f"not UTF-8 text: {', '.join(odd)}", ExitCode.BAD_OPTION)
    try:
        code = app(given, exit_on_error=False, print_error=False, result_action="return_value")
    except UnusedCliTokensError as error:
        unused = [repr(each) for each in error.unused_tokens or ()]
        what = "unexpected argument" if len(unused) == 1 else "unexpected arguments"
        return fail(app, f"{what} {', '.join(unused)}", ExitCode.BAD_OPTION)
    except CycloptsError as error:
        return fail(app, " ".join(str(error).split()), ExitCode.BAD_OPTION)
    except UserError as error:
        return fail(app, str(error), error.exit_code)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of the output is gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(code or 0)


def fail(app: App, message: str, code: int) -> int:
    """Say on stderr what is wrong; returns ``code``."""
    print(f"{app.name[0]}: error: {readable(message)}", file=sys.stderr)
    return code


def one_or_more_of(known: Sequence[str], meaning: str, metavar: str) -> Parameter:
    """An option whose value is a list of known words with commas between them; `all` is every one."""

    def convert(_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
        words = {word.strip() for token in tokens for word in token.value.split(",") if word.strip()}
        unknown = sorted(words - {*known, "all"})
        if unknown or not words:
            raise ValueError(f"{', '.join(unknown) or 'nothing'} is not one of {', '.join(known)}")
        return tuple(word for word in known if word in words or "all" in words)

    return Parameter(
        converter=convert,
        n_tokens=1,
        metavar=metavar,
        help=f"{meaning}, of {','.join(known)}, or all",
        show_choices=False,
        show_default=lambda value: "all" if tuple(value) == tuple(known) else _default(",".join(value)),
    )


def _default(value: Any) -> Any:
    """What help tells of a default; None: nothing, where nothing is set."""
    return None if value is False or value in (None, "", (), []) else value
