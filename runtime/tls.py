"""Settings of what protects the cluster's own connections. Holds values only."""

from __future__ import annotations

import msgspec


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What protects the cluster's own connections: certificates in PEM files, or a token (docs/security.md)."""

    cert_file: str = ""
    """Certificate of this process, with those between it and the CA. With key_file and ca_file every port but those
    of clients asks its caller for a certificate of that CA. Watch baton_certificate_expires_timestamp_seconds."""
    key_file: str = ""
    """Its private key."""
    ca_file: str = ""
    """The CA of this cluster alone: every certificate of it is trusted."""
    name: str = "baton"
    """DNS name that every certificate of the cluster carries, beside any others."""
    token_file: str = ""
    """Without certificates: a file of at least 32 bytes that its owner alone may read (mode 600). Processes show each
    other what it holds with every gRPC call, and refuse calls without it. It hides nothing from who reads the network.
    """
