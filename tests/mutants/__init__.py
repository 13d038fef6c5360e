"""Named mutants of the defences, one list a part, and what runs them."""
