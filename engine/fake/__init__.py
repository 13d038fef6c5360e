"""A deterministic engine without a model, for tests and simulation. Never what a user starts by default."""
