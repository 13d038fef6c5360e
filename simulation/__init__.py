"""Virtual time, faults and checkers around the production cores. Runs the code that serves, never a copy of it."""
