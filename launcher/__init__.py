"""Starts clusters of Baton processes and tells how they are. Nothing below imports it."""
