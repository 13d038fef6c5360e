"""The host tier in vLLM: Baton's halves of its offloading connector. Imports vLLM; ``kv_transfer/tiers`` decides."""
