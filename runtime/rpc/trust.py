"""What protects the connections of this process. One process is one end, so its certificates are held here, once.

Without certificates or a token connections are open, as on a laptop. Engine processes inherit what their worker uses.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec
import structlog
from prometheus_client import Gauge

from runtime.rpc import cluster_token
from runtime.rpc.certificates import Certificates, TlsFiles
from runtime.tls import TlsConfig
from runtime.user_error import UserError

log = structlog.get_logger(__name__)

INHERITED_VARIABLE = "BATON_INHERITED_TLS"
"""Tells a process that a worker starts which certificates it has."""
LOOK_INTERVAL_S = 10.0
"""How often it is looked whether the files changed."""
WARN_BEFORE_S = 14 * 86_400.0
WARN_INTERVAL_S = 86_400.0

EXPIRES = Gauge(
    "baton_certificate_expires_timestamp_seconds", "When a certificate of this process ends, since 1970.", ["use"]
)


class _Trust:
    def __init__(self) -> None:
        self.used = TlsConfig()
        self.cluster: Certificates | None = None
        self.token: bytes | None = None
        self.front_door: Certificates | None = None
        self.inherited = False


_trust = _Trust()


def use(config: TlsConfig) -> None:
    """Speak to the cluster's processes with these certificates, or this token, from now on.

    Raises UserError, BadCertificate.
    """
    given = {"cert_file": config.cert_file, "key_file": config.key_file, "ca_file": config.ca_file}
    _trust.used, _trust.cluster, _trust.token = TlsConfig(), None, None
    if config.token_file:
        if any(given.values()):
            raise UserError("tls.token_file is for clusters without certificates: leave it out, or the certificates")
        path = Path(config.token_file).expanduser().absolute()
        _trust.token = cluster_token.read(path)
        _hold(TlsConfig(token_file=str(path)))
    if not any(given.values()):
        return
    if missing := [f"tls.{field}" for field, value in given.items() if not value]:
        raise UserError(f"{' and '.join(missing)} must be set: tls.cert_file, tls.key_file and tls.ca_file go together")
    cert, key, ca = (Path(value).expanduser().absolute() for value in given.values())
    held = Certificates(TlsFiles(cert=cert, key=key, ca=ca, name=config.name))
    _trust.cluster = held
    _hold(TlsConfig(cert_file=str(cert), key_file=str(key), ca_file=str(ca), name=config.name))
    _show("cluster", held)


def _hold(used: TlsConfig) -> None:
    _trust.used = used
    os.environ[INHERITED_VARIABLE] = msgspec.json.encode(used).decode()


def used() -> TlsConfig:
    """What this process speaks to the cluster with, with absolute paths."""
    return _trust.used


def open_front_door(cert_file: str, key_file: str) -> None:
    """Show this certificate to clients. Empty: they connect without TLS. Raises UserError, BadCertificate."""
    if not cert_file and not key_file:
        return
    if not (cert_file and key_file):
        raise UserError("front_proxy.tls_cert_file and front_proxy.tls_key_file go together")
    files = TlsFiles(cert=Path(cert_file).expanduser().absolute(), key=Path(key_file).expanduser().absolute())
    _trust.front_door = Certificates(files)
    _show("front_door", _trust.front_door)


def cluster() -> Certificates | None:
    """Those of the cluster. None: it has none."""
    _inherit()
    return _trust.cluster


def token() -> bytes | None:
    """What the cluster's processes show each other where they have no certificates. None: nothing."""
    _inherit()
    return _trust.token


def _inherit() -> None:
    if not _trust.inherited and _trust.used == TlsConfig():
        _trust.inherited = True
        if text := os.environ.get(INHERITED_VARIABLE):
            use(msgspec.json.decode(text, type=TlsConfig))


def front_door() -> Certificates | None:
    """Those that clients see. None: they connect without TLS."""
    return _trust.front_door


def name() -> str:
    """The DNS name of every process of the cluster."""
    return _trust.used.name


def forget() -> None:
    """Hold none: for tests, which are one process."""
    _trust.__init__()  # type: ignore[misc]
    os.environ.pop(INHERITED_VARIABLE, None)


async def watch() -> None:
    """Read files again that changed, and say days before that a certificate ends. Runs until it is cancelled."""
    warned_s: dict[str, float] = {}
    while True:
        for use_of, held in (("cluster", cluster()), ("front_door", front_door())):
            if held is None:
                continue
            held.look()
            _show(use_of, held)
            left_s = held.expires_at_s - time.time()
            if left_s < WARN_BEFORE_S and time.monotonic() >= warned_s.get(use_of, 0.0):
                warned_s[use_of] = time.monotonic() + WARN_INTERVAL_S
                days = round(left_s / 86_400, 1)
                log.warning("a certificate ends soon", use=use_of, file=str(held.files.cert), in_days=days)
        await asyncio.sleep(LOOK_INTERVAL_S)  # no event tells of a file on every file system


def _show(use_of: str, held: Certificates) -> None:
    EXPIRES.labels(use_of).set(held.expires_at_s)
