"""Variables that Kubernetes sets in a pod for each Service of its namespace, told from settings by their form.

A Service named ``baton-worker`` gives ``BATON_WORKER_PORT=tcp://10.0.0.2:9000`` and several more.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping

_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://\[?([^\[\]]+)\]?:\d+")


def is_service_link(name: str, value: str) -> bool:
    """Whether ``name`` and ``value`` both are as Kubernetes makes them."""
    return any(form.fullmatch(name) and fits(value) for form, fits in _FORMS)


def found_in(environ: Mapping[str, str], prefixes: tuple[str, ...]) -> list[str]:
    """The names of service links that begin with one of ``prefixes``."""
    return sorted(name for name, value in environ.items() if name.startswith(prefixes) and is_service_link(name, value))


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    return found is not None and _is_ip_address(found[1])


def _form(end: str) -> re.Pattern[str]:
    # A Service's name ends in a letter or a digit. So no Service sets BATON_WORKER__PORT: that is a setting.
    return re.compile(rf"\w*[A-Z0-9]_{end.replace('PROTOCOL', '(?:TCP|UDP|SCTP)')}", re.ASCII)


_FORMS: tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...] = (
    (_form(r"SERVICE_HOST"), _is_ip_address),
    (_form(r"SERVICE_PORT(?:_\w+)?"), str.isdecimal),
    (_form(r"PORT(?:_\d+_PROTOCOL)?"), _is_address),
    (_form(r"PORT_\d+_PROTOCOL_PROTO"), ("tcp", "udp", "sctp").__contains__),
    (_form(r"PORT_\d+_PROTOCOL_PORT"), str.isdecimal),
    (_form(r"PORT_\d+_PROTOCOL_ADDR"), _is_ip_address),
)
