"""The small model that `baton up` serves when none is named."""
