"""Target models, their evaluation and the report."""
