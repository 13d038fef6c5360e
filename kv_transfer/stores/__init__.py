"""Segments of KV blocks in folders and buckets: reading, writing, watching, and the book of one. No vLLM."""
