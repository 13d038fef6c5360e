"""How a scheduler process ends when nobody told it to: for itself, and for whoever starts it again. Imports nothing."""

from __future__ import annotations

EXIT_BROKEN = 3
"""The core broke an invariant."""
EXIT_NOT_LEADER = 4
"""It led and does so no more: started again, it stands by. Nothing is wrong with it."""
