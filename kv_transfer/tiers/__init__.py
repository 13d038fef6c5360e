"""Tiers below the engine's own KV memory: what lies in them, what leaves first, when loading pays. Pure."""
