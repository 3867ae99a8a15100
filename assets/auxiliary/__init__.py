"""Stage 2: the prior, conditional and domain-only models."""
