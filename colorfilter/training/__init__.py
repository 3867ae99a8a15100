"""Training of causal language models."""
