"""Real vLLM and real NIXL with one worker to spare, on loopback."""
