"""Selections, contamination and filtered datasets, and the checks of both."""
