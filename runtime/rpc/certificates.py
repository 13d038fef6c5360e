"""Certificates of one end: read, checked by a handshake with itself, and read again when their files change.

Knows no port and no process. Errors are one sentence each, before anything is started.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import msgspec
import structlog

from runtime.user_error import UserError

log = structlog.get_logger(__name__)

_HANDSHAKE_STEPS_MAX = 16
_REASONS = {
    "certificate has expired": "has expired",
    "certificate is not yet valid": "is not valid yet",
    "unable to get local issuer certificate": "was signed by another CA than that of the CA file",
    "unable to get issuer certificate": "was signed by another CA than that of the CA file",
    "self-signed certificate": "was signed by itself, and not by the CA of the CA file",
    "self-signed certificate in certificate chain": "was signed by another CA than that of the CA file",
}


class BadCertificate(UserError):
    """Certificates that cannot be used, with the file and the reason."""


class TlsFiles(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files of one end. ``ca``: only peers with a certificate of this CA are spoken to; None: anybody may call.

    ``name``: the DNS name that every certificate of this CA must carry; unused without ``ca``.
    """

    cert: Path
    key: Path
    ca: Path | None = None
    name: str = ""


class Certificates:
    """What the files held when they were last good. ``look`` reads them again if they changed."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises BadCertificate."""
        self.files = files
        self.version = 0
        """Grows each time other files are used."""
        self._stamp = self._stamps()
        self.expires_at_s = rehearse(files)
        """Since 1970."""
        self._contexts: list[ssl.SSLContext] = []
        self._read()

    def look(self) -> None:
        """Use the files as they are now, if they changed and are good. Bad ones are logged, and the former stay."""
        stamp = self._stamps()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.expires_at_s = rehearse(self.files)
            self._read()
        except (BadCertificate, OSError) as error:
            log.error("changed certificates are not used", why=str(error))
            return
        self.version += 1
        for context in self._contexts:
            # Handshakes from now on take these.
            context.load_cert_chain(self.files.cert, self.files.key)
        log.info("certificates were read again", certificate=str(self.files.cert))

    def server_context(self) -> ssl.SSLContext:
        """For a server of HTTP; it follows the files."""
        context = _server_context(self.files)
        self.follow(context)
        return context

    def follow(self, context: ssl.SSLContext) -> None:
        """Keep a server's context at the certificate. A CA that changed holds from the next start on."""
        self._contexts.append(context)

    def client_context(self) -> ssl.SSLContext:
        """For a client of HTTP, which shows this certificate. Names are not compared: any process of the CA will do."""
        context = _client_context(self.files)
        context.check_hostname = False
        return context

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server; it follows the files."""
        served = self.version

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            if served == self.version:
                return None
            served = self.version
            return self._configuration()

        # One of gRPC's threads calls it, at each handshake.
        require = self.files.ca is not None
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            fetch,  # type: ignore[arg-type] # the stubs do not know that it may have nothing new
            require_client_authentication=require,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a gRPC client, as the files were last."""
        return grpc.ssl_channel_credentials(self._ca, self._key, self._cert)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self._key, self._cert)], root_certificates=self._ca)

    def _read(self) -> None:
        self._cert, self._key = self.files.cert.read_bytes(), self.files.key.read_bytes()
        self._ca = self.files.ca.read_bytes() if self.files.ca is not None else None

    def _stamps(self) -> list[tuple[int, int]]:
        found = []
        for file in (self.files.cert, self.files.key, self.files.ca):
            if file is not None:
                try:
                    about = file.stat()
                except OSError:
                    found.append((0, 0))
                else:
                    found.append((about.st_mtime_ns, about.st_ino))
        return found


def rehearse(files: TlsFiles) -> float:
    """Shake hands with itself, in memory: when the certificate expires, in seconds since 1970. Raises BadCertificate.

    So OpenSSL itself says what a peer would object to: another CA, another name, another key, the date.
    """
    server, client = _server_context(files), _client_context(files)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    name = files.name or None
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    _shake(files, ends)
    about = ends[0].getpeercert()
    assert about is not None, "it was verified"
    return float(ssl.cert_time_to_seconds(str(about["notAfter"])))


def _shake(files: TlsFiles, ends: tuple[ssl.SSLObject, ssl.SSLObject]) -> None:
    for _ in range(_HANDSHAKE_STEPS_MAX):
        waits = 0
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waits += 1
            except ssl.SSLCertVerificationError as error:
                said = error.verify_message
                why = _REASONS.get(said, said)
                if "Hostname mismatch" in said:
                    why = f"does not carry the DNS name {files.name!r} (tls.name)"
                raise BadCertificate(f"The certificate {files.cert} {why}.") from error
            except ssl.SSLError as error:
                raise BadCertificate(f"The certificate {files.cert} cannot be used: {error.reason}.") from error
        if not waits:
            return
    raise BadCertificate(f"The certificate {files.cert} cannot be used: its handshake does not end.")


def _server_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(files, context)
    if files.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _client_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(files, context)
    if files.ca is None:
        # No CA is known: the certificate vouches for itself, so that its date is looked at.
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        _read_by(files.cert, lambda: context.load_verify_locations(files.cert))
    return context


def _load(files: TlsFiles, context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for file in (files.cert, files.key):
        _read_by(file, lambda file=file: file.open("rb").close())  # type: ignore[misc]
    try:
        context.load_cert_chain(files.cert, files.key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadCertificate(f"The key {files.key} is not that of the certificate {files.cert}.") from error
        raise BadCertificate(f"{files.cert} and {files.key} hold no certificate with its key in PEM.") from error
    if files.ca is not None:
        ca = files.ca
        _read_by(ca, lambda: context.load_verify_locations(ca))


def _read_by(file: Path, read: Callable[[], None]) -> None:
    try:
        read()
    except ssl.SSLError as error:
        raise BadCertificate(f"{file} holds no certificate in PEM.") from error
    except OSError as error:
        raise BadCertificate(f"{file} cannot be read: {error.strerror}.") from error
