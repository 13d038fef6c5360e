"""`baton config`: the settings and where each comes from."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Group, Parameter, validators

from cli.settings import NO_SOURCES, Sources, load

_FORM = Group("Form", validator=validators.LimitedChoice(0, 1))


def config(
    *,
    all: Annotated[bool, Parameter(group=_FORM)] = False,  # noqa: A002 - the option's name
    json: Annotated[bool, Parameter(group=_FORM)] = False,
    schema: Annotated[bool, Parameter(group=_FORM)] = False,
    sources: Sources = NO_SOURCES,
) -> None:
    """Show the settings that differ from the defaults, and where each comes from.

    Parameters
    ----------
    all
        show every setting
    json
        print a file that --config reads
    schema
        print the JSON schema of that file
    """
    import msgspec

    from launcher.config import BatonConfig
    from runtime.configuration import differing, dump, settings

    loaded = load(sources)
    if schema:
        print(msgspec.json.format(msgspec.json.encode(msgspec.json.schema(BatonConfig)), indent=2).decode())
        return
    if json:
        print(dump(loaded.value).decode(), end="")
        return
    shown = settings(loaded) if all else differing(loaded)
    for setting in shown:
        print(f"{setting.path} = {msgspec.json.encode(setting.value).decode()}  # {setting.source}")
    if not shown:
        print("# every setting has its default; --all shows them")
