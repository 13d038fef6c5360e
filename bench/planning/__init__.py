"""How many plans a second the scheduler makes, in one process, bare and over gRPC."""
