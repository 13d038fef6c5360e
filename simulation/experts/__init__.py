"""Rollouts of expert maps under faults, in virtual time: the machines of scheduler and ranks, and a group of ranks."""
