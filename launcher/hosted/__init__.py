"""Runs a cluster on any host that can start single processes: order, restarts, state file, commands."""
