"""One request's life, as pure machines: events in, actions out. No clock, no I/O."""
