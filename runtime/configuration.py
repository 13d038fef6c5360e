"""Loading a configuration tree of msgspec structs from defaults, a file, the environment and ``key=value`` settings.

Later sources win in that order. Every value remembers where it came from, and every error names the path of its key.
The given struct defines which keys exist.

An environment variable sets ``a.b_c`` as ``<prefix>A__B_C``. A variable with the prefix but without ``__`` is read only
if it names a top-level value: other programs' variables may share the prefix. A key with ``_`` in the place of ``__``
is an error. What Kubernetes sets for a Service is no setting, whatever its name.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

import msgspec

from runtime.service_links import is_service_link
from runtime.user_error import UserError

T = TypeVar("T", bound=msgspec.Struct)

DEFAULT = "default"
_NO_DEFAULT = object()
COMMAND_LINE = "--set"
_NEAREST_MAX = 3
# With a lower value the name of a removed setting would match an unrelated one.
_LIKENESS_MIN = 0.8
_NOTHING_NEAR = "docs/upgrading.md lists settings that are gone; `baton config --all` shows every setting"
_ERROR_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


class BadConfiguration(UserError):
    """A configuration that cannot be used; ``path`` is the dotted key at fault, empty when it is the whole source."""

    exit_code = 2

    def __init__(self, path: str, reason: str, source: str) -> None:
        super().__init__("configuration: " + (f"{path}: {reason} ({source})" if path else f"{reason} ({source})"))
        self.path = path
        self.reason = reason
        self.source = source


class Loaded(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A configuration and the source of each of its values, by dotted path."""

    value: T
    sources: dict[str, str]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a resolved configuration, as people read it."""

    path: str
    value: Any
    source: str


class _Text(msgspec.Struct, frozen=True):
    """A value given as text: parsed by the type of its key."""

    text: str


def load(
    cls: type[T],
    *,
    file: Path | None,
    environ: Mapping[str, str],
    sets: Sequence[str],
    options: Sequence[tuple[str, str]] = (),
    prefix: str = "BATON_",
) -> Loaded[T]:
    """Build ``cls`` from its defaults, then ``file`` (TOML or JSON), then ``environ``, ``sets`` and ``options``.

    ``options``: settings given by their own option, each as the option's name and ``key=value``.

    Raises BadConfiguration for an unknown key, a value of the wrong type, or a file that cannot be read.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if file is not None:
        for path, value in _leaves(cls, _read(file), f"file {file}"):
            _put(cls, tree, sources, path, value, f"file {file}")
    for name, text in sorted(environ.items()):
        if not name.startswith(prefix) or is_service_link(name, text):
            continue
        if keys := _environment_path(cls, name.removeprefix(prefix), prefix):
            _put(cls, tree, sources, keys, _Text(text), f"env {name}")
    for source, setting in (*((COMMAND_LINE, each) for each in sets), *options):
        key, separator, text = setting.partition("=")
        if not separator or not key.strip():
            raise BadConfiguration(key.strip(), f"expected key=value, got {setting!r}", source)
        _put(cls, tree, sources, tuple(key.strip().split(".")), _Text(text), source)
    value = _convert(cls, tree, sources)
    return Loaded(value=value, sources={path: _source(sources, path) for path, _ in _struct_leaves(value)})


def settings(loaded: Loaded[Any]) -> list[Setting]:
    """Every value of ``loaded`` with its source, in the order of declaration."""
    return [
        Setting(path=path, value=msgspec.to_builtins(value), source=_source(loaded.sources, path))
        for path, value in _struct_leaves(loaded.value)
    ]


def differing(loaded: Loaded[Any]) -> list[Setting]:
    """The values of ``loaded`` that are not the defaults."""
    plain = load(type(loaded.value), file=None, environ={}, sets=())
    defaults = {setting.path: setting.value for setting in settings(plain)}
    return [setting for setting in settings(loaded) if setting.value != defaults.get(setting.path, _NO_DEFAULT)]


def source_of(loaded: Loaded[Any], path: str) -> str:
    """Where the value at ``path`` was set."""
    return _source(loaded.sources, path)


def dump(value: msgspec.Struct) -> bytes:
    """``value`` as a JSON file that ``load`` reads back to an equal one."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _read(file: Path) -> dict[str, Any]:
    source = f"file {file}"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BadConfiguration("", f"cannot read the file: {error.strerror}", source) from error
    language = "JSON" if file.suffix == ".json" else "TOML"
    try:
        tree = json.loads(content) if language == "JSON" else tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # JSON, TOML and UTF-8 errors are all ValueErrors
        raise BadConfiguration("", f"not valid {language}: {error}", source) from error
    if not isinstance(tree, dict):
        raise BadConfiguration("", "the top level must be a table", source)
    return tree


def _leaves(
    cls: type[msgspec.Struct], tree: Mapping[str, Any], source: str, at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What ``tree`` sets, one value of ``cls`` at a time."""
    for key, value in tree.items():
        path = (*at, key)
        nested: Any = _hints(cls).get(key)
        if not _is_struct(nested):
            yield path, value
        elif isinstance(value, dict):
            yield from _leaves(nested, value, source, path)
        else:
            raise BadConfiguration(".".join(path), f"expected a table, got {value!r}", source)


def _environment_path(cls: type[msgspec.Struct], name: str, prefix: str) -> tuple[str, ...]:
    hints = _hints(cls)
    keys = tuple(name.lower().split("__"))
    if len(keys) > 1 or (keys[0] in hints and not _is_struct(hints[keys[0]])):
        return keys
    for section, nested in hints.items():
        # A key of ours with too few underscores is an error.
        key = keys[0].removeprefix(f"{section}_")
        if key != keys[0] and _is_struct(nested) and key in _hints(nested):
            raise BadConfiguration(
                f"{section}.{key}",
                f"spell it {prefix}{name[: len(section)]}__{name[len(section) + 1 :]}",
                f"env {prefix}{name}",
            )
    return ()


def _put(
    cls: type[msgspec.Struct],
    tree: dict[str, Any],
    sources: dict[str, str],
    path: tuple[str, ...],
    value: Any,
    source: str,
) -> None:
    """Set one value; the key must exist and the value must fit its type."""
    owner: Any = cls
    branch = tree
    for depth, key in enumerate(path):
        at = ".".join(path[: depth + 1])
        if _is_struct(owner):
            if key not in _hints(owner):
                raise BadConfiguration(at, f"unknown key; {_advice(cls, path)}", source)
            kind = _hints(owner)[key]
        else:
            kind = Any  # below a mapping, where every key may be
        last = depth + 1 == len(path)
        if last and _is_struct(kind):
            raise BadConfiguration(at, "is a table; set one of its keys", source)
        if last:
            branch[key] = _fit(kind, value, path, source)
            _check_text(path, branch[key], source)
            break
        if not (_is_struct(kind) or _is_mapping(kind) or kind is Any):
            raise BadConfiguration(".".join(path), f"{key} is a value, not a table", source)
        owner, branch = kind, branch.setdefault(key, {})
        if not isinstance(branch, dict):
            raise BadConfiguration(".".join(path), f"{key} is a value, not a table", source)
    sources[".".join(path)] = source


def _advice(cls: type[msgspec.Struct], path: tuple[str, ...]) -> str:
    """The settings of ``cls`` most likely meant by the unknown ``path``."""
    *table, wanted = path
    paths = [tuple(setting.split(".")) for setting in _all_settings(cls)]
    namesakes = [each for each in paths if each[-1] == wanted and _may_be_meant(each, path, _hints(cls))]
    beside = {each[-1]: each for each in paths if each[:-1] == tuple(table)}
    near = difflib.get_close_matches(wanted, beside, n=_NEAREST_MAX, cutoff=_LIKENESS_MIN)
    found = sorted(map(".".join, namesakes), key=lambda each: -_ratio(each, ".".join(path)))[:_NEAREST_MAX]
    found = found or [".".join(beside[name]) for name in near]
    return f"did you mean {' or '.join(found)}?" if found else _NOTHING_NEAR


def _may_be_meant(namesake: tuple[str, ...], path: tuple[str, ...], sections: Mapping[str, Any]) -> bool:
    """Whether the unknown ``path`` may mean ``namesake``, a setting with the same last word.

    True in the same section, at the same depth in another section, or if the section is unknown.
    """
    return path[0] not in sections or namesake[0] == path[0] or len(namesake) == len(path)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _all_settings(cls: type[msgspec.Struct], at: str = "") -> Iterator[str]:
    """Every value of ``cls`` that can be set, by dotted path; no table."""
    for name, kind in _hints(cls).items():
        if _is_struct(kind):
            yield from _all_settings(kind, f"{at}{name}.")
        else:
            yield f"{at}{name}"


def _fit(kind: Any, value: Any, path: tuple[str, ...], source: str) -> Any:
    """``value`` converted to ``kind``, as builtins."""
    candidates: list[Any] = [value]
    if isinstance(value, _Text):
        found = _as_json(value.text)
        # null is tried first, to unset an optional text; then text, then JSON. Where the type is Any: JSON, then text.
        null = [None] if value.text == "null" else []
        candidates = [*found, value.text] if kind is Any else [*null, value.text, *found]
    reason = ""
    for candidate in candidates:
        try:
            return msgspec.to_builtins(msgspec.convert(candidate, kind, strict=not isinstance(value, _Text)))
        except msgspec.ValidationError as error:
            reason = str(error)
    raise BadConfiguration(".".join(path), reason, source)


def _check_text(path: tuple[str, ...], value: Any, source: str) -> None:
    """Refuse lone surrogates. Python makes them of bytes that are not UTF-8, and no process could be told of them."""
    try:
        msgspec.json.encode((path, value))
    except UnicodeEncodeError:
        raise BadConfiguration(".".join(path), "is not UTF-8 text", source) from None


def _as_json(text: str) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        return []


def _convert(cls: type[T], tree: dict[str, Any], sources: Mapping[str, str]) -> T:
    try:
        return msgspec.convert(tree, cls)
    except msgspec.ValidationError as error:  # a struct's own __post_init__ refused a combination
        found = _ERROR_PATH.search(str(error))
        path = found["path"] if found else ""
        raise BadConfiguration(path, _ERROR_PATH.sub("", str(error)), _source(sources, path)) from error


def _struct_leaves(value: msgspec.Struct, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by dotted path; also each item of a mapping."""
    for name in value.__struct_fields__:
        inner, path = getattr(value, name), f"{at}{name}"
        if isinstance(inner, msgspec.Struct):
            yield from _struct_leaves(inner, f"{path}.")
        elif isinstance(inner, dict) and inner:
            yield from ((f"{path}.{key}", item) for key, item in inner.items())
        else:
            yield path, inner


def _source(sources: Mapping[str, str], path: str) -> str:
    """Where ``path`` was set: itself, the mapping it lies in, or something below it."""
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        if (source := sources.get(".".join(parts[:depth]))) is not None:
            return source
    below = [source for key, source in sources.items() if not path or key.startswith(f"{path}.")]
    return ", ".join(dict.fromkeys(below)) or DEFAULT


def _hints(cls: type[msgspec.Struct]) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _is_mapping(kind: Any) -> bool:
    return kind is dict or get_origin(kind) in (dict, Mapping)
