"""What both APIs do with a request before anything else: its identity, its place, and what is noted about it."""
