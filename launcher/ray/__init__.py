"""Ray as a host: Ray finds a node for each process and starts it there; Baton supervises it. Needs the package ray."""
