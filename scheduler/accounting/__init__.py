"""Keys and accounts around the scheduler: the ledger, what front proxies say, what operators ask."""
