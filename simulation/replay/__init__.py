"""Recorded and made traffic, replayed in virtual time over models of workers, under any policy."""
