"""Is the advice of `baton plan` and `baton tune` good? Laws beside measured points, regret, shifting load."""
