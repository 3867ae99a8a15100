"""Selections computed from losses, and the datasets built from selections."""
