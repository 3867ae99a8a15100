"""Causal language models: loaded, saved and made fast."""
