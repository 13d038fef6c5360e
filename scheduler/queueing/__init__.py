"""Which request is placed next, waits or is refused. Pure."""
