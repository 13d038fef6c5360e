"""vLLM's EngineClient over remote workers: sampling, sequences, outputs. Imports vLLM."""
