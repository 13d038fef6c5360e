"""The words others may import: events, actions and what is known of a worker. Values only."""
