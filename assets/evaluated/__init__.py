"""Stage 5: target models, their evaluation and the report."""
