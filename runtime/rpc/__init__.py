"""gRPC plumbing: servers, channels, streams that reconnect, queues of messages, and how a failure looks on the wire."""
