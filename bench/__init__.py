"""Measures Baton and its peers from the outside. Nothing imports it, and it reaches into no process it measures."""

import baton_llm  # noqa: F401 - first, so that what follows is Baton's
