"""The commands that plan with recorded and made traffic."""
