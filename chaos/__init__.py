"""Breaks a cluster under traffic, a real one or one in virtual time, by one schedule, and judges what clients saw."""
