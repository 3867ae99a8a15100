"""Causal language models: building, loading, saving and speeding up."""
