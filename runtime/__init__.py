"""Process plumbing that any gRPC service would want. No word like prefill, KV or expert appears here."""

import os

# gRPC reads this when it is first imported. Its fork handlers only cost time and log noise here: engines fork before
# any channel exists, or do not fork at all.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
