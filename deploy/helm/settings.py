"""What the chart knows of Baton's settings: their types and bounds, in its schema, and what `engine.args` may not name.

Run `make chart` after a change of settings.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from engine.preflight import OWN_SETTINGS
from launcher.config import BatonConfig

CHART = Path(__file__).parent / "baton"
SCHEMA = CHART / "values.schema.json"
ARGUMENTS = CHART / "arguments.json"
_REMARKS = ("title", "description", "default")
# A definition that this program wrote: its name begins with a capital.
_WRITTEN = re.compile(r'^    "[A-Z].*?^    \},\n', re.MULTILINE | re.DOTALL)


def schema_text(present: str) -> str:
    """The chart's schema with the definitions of Baton's settings written anew."""
    sections = get_type_hints(BatonConfig)
    # Of other places than pods.
    del sections["launcher"]
    references, structs = msgspec.json.schema_components(sections.values(), ref_template="#/$defs/{name}")
    whole = {"type": "object", "properties": dict(zip(sections, references, strict=True))}
    written = "".join(_definition(name, schema) for name, schema in {"BatonConfig": whole, **structs}.items())
    return _WRITTEN.sub("", present).replace('"$defs": {\n', f'"$defs": {{\n{written}', 1)


def arguments_text() -> str:
    """Which setting says what an argument of vLLM would."""
    return json.dumps(OWN_SETTINGS, indent=1) + "\n"


def _definition(name: str, schema: dict[str, Any]) -> str:
    """One setting a line. No other key is let in."""
    bare = _bare(schema)
    if properties := bare.pop("properties", None):
        bare["additionalProperties"] = False
    lines = [f'      "{key}": {json.dumps(value)}' for key, value in bare.items()]
    if properties:
        inner = ",\n".join(f'        "{key}": {json.dumps(_bare(value))}' for key, value in properties.items())
        lines.append(f'      "properties": {{\n{inner}\n      }}')
    return f'    "{name}": {{\n' + ",\n".join(lines) + "\n    },\n"


def _bare(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in _REMARKS and value != []}


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(SCHEMA.read_text()))
    ARGUMENTS.write_text(arguments_text())
