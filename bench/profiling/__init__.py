"""Measures one engine: what prompts, decode steps and hand-offs take."""
