"""What only a decode worker does: validate a hand-off before the engine takes it over."""
