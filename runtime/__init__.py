"""Process plumbing that any gRPC service would want. No word like prefill, KV or expert appears here."""
