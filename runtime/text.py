"""Names that may not be text: arguments, variables and paths hold any bytes, which Python keeps as lone surrogates."""

from __future__ import annotations


def is_text(name: str) -> bool:
    """Whether ``name`` can be written as UTF-8, as all that is sent or kept must be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(name: str) -> str:
    """``name`` for people to read, with what is not text escaped."""
    return name.encode(errors="backslashreplace").decode()
