"""The gRPC API for services that want throughput, and its client."""
