"""Losses of packed sequences under language models."""
