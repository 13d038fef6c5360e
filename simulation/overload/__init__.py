"""The cluster past its capacity, in virtual time."""
