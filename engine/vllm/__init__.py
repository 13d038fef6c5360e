"""vLLM behind the engine protocol. The only room of engine/ that imports vLLM."""
