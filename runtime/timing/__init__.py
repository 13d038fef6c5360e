"""Time and pace: clocks, timeouts, backoff, rates and Retry-After. Nothing here sleeps by itself."""
