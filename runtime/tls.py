"""Settings of the certificates of the cluster's own connections. Holds values only."""

from __future__ import annotations

import msgspec


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Certificates of the cluster's own connections (docs/security.md). PEM files, read again when they change."""

    cert_file: str = ""
    """Certificate of this process, with those between it and the CA. With key_file and ca_file every port but those
    of clients asks its caller for a certificate of that CA. Watch baton_certificate_expires_timestamp_seconds."""
    key_file: str = ""
    """Its private key."""
    ca_file: str = ""
    """The CA of this cluster alone: every certificate of it is trusted."""
    name: str = "baton"
    """DNS name that every certificate of the cluster carries, beside any others."""
