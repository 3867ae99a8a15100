"""Stage 4: selections, leakage of held-out text, filtered datasets, and their checks."""
