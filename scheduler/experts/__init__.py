"""Placement of MoE experts on the ranks of a group. Pure, over numpy: imported only where a group registers."""
