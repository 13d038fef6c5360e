"""Who asks, what it may use, what it used and what that costs. Pure: no transport, no clock, no storage."""
