"""The `baton` command: reads arguments and configuration, and calls what does the work."""
