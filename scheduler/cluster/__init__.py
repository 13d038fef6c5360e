"""What is known of the cluster: members, health, leases. Pure."""
