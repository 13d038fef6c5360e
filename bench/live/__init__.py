"""Real clusters beside the simulator: the same load on both, what they say, and how far they differ."""
