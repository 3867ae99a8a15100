"""Execution of heavy work: local worker processes or a Ray cluster."""
