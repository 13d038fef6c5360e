"""What KV tiers do: against the disk's own speed, with many blocks, and in conversations with a real engine."""
