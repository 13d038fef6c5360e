"""Placement of experts in vLLM's worker processes: what is patched, how a map goes live, each rank's stream."""
