"""Where the work is done: local worker processes, or a Ray cluster."""
