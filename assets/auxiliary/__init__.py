"""Tokenizer, prior and conditional models."""
