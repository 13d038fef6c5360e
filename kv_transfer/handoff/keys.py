"""Keys that Baton adds to a request's ``kv_transfer_params``, for engines and connectors alike."""

from __future__ import annotations

LEASE = "baton_lease"
LEASE_S = "baton_lease_s"
"""How long to hold the KV, in seconds."""
RELEASE = "baton_release"
"""A list of lease ids."""
RENEW = "baton_renew"
"""Seconds from now, by lease id."""
FACTS = "baton_facts"
"""Asks the connector for what only its half in the engine's process knows; also the name of the answer."""
