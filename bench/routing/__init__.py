"""``python -m bench routing``: one trace under many routing policies, on one model of a cluster."""
