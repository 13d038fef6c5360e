"""Where a request runs: filters, cost and choice. Pure."""
