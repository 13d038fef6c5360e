"""The inference-engine seam: Baton's words for an engine, and the adapters that speak them."""
