"""Which of several schedulers leads: ``rules`` (pure) and two stores, a locked file and a Lease of Kubernetes."""
