"""The production machines under faults, seed by seed, and what must hold."""
