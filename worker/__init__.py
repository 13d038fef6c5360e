"""The core that prefill and decode workers share: streams, batching, admission, session, drain."""
