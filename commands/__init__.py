"""The command-line interface, `colorfilter`."""
