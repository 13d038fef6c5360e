"""What only a decode worker does: judge a hand-off before the engine takes it over."""
