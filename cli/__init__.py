"""The `baton` command: reads arguments and configuration, and calls what does the work."""

import baton_llm  # noqa: F401 - first, so that what follows is Baton's
