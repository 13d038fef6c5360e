"""`baton doctor`: what is well and what is not, before a start and after it. Changes nothing."""
