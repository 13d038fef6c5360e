"""Proof that transferred KV is the KV that was held: digests, checksums, and the answers of its holder."""
