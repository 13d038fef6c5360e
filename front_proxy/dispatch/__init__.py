"""The shells that drive requests: streams to scheduler and workers, timers, metrics."""
