"""How many workers of each role: changes of role, the forecast of demand, and the planner of both. Pure."""
