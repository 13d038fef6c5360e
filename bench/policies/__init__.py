"""The routing policies of other systems, from their published formulas, behind the replay's interface. Pure."""
