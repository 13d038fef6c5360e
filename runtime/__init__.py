"""Process plumbing that any gRPC service would want. No word like prefill, KV or expert appears here."""

import os

# gRPC reads these when it is first imported; what the operator has set wins.
GRPC_ENVIRONMENT = {
    # Its fork handlers only cost time and log noise here: engines fork before any channel exists, or not at all.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # A message then takes two threads and a third of CPU less (docs/adr/0005-grpc-without-event-engine.md).
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}
for _name, _value in GRPC_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
