"""Solvers for expert placement side by side, on recorded or made counts."""
