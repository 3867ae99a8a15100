"""`colorfilter backup` and `colorfilter restore`."""
