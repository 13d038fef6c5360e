"""Measures Baton and its peers from the outside. Nothing imports it, and it reaches into no process it measures."""
