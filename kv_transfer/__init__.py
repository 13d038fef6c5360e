"""Moving KV: hand-offs, leases, layouts and the NIXL connector. Knows blocks and bytes, never requests' content."""
