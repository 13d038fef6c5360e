"""Which KV blocks the engine of this worker holds, from the engine's events. Pure."""
