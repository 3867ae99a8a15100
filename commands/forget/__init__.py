"""`colorfilter forget`: removes documents for good."""
