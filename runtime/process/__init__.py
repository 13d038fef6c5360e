"""What every process does around its work: start, stop, log, serve metrics, end with a code."""
