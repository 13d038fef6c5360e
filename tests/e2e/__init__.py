"""Real processes, real vLLM, real NIXL, on loopback."""
