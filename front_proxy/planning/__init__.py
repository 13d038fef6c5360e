"""How a plan is got: from the scheduler, or from the last view of the cluster without it. Pure."""
