"""What only a prefill worker does: hold KV under leases until a decode worker has pulled it."""
