"""Virtual time, faults and checkers around the production cores. Runs the code that serves, never a copy of it."""

import baton_llm  # noqa: F401 - first, so that what follows is Baton's
