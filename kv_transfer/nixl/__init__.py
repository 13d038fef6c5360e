"""The NIXL connector: moves KV blocks between engines. The only room of kv_transfer/ that imports vLLM."""
