"""Losses, the published score tables and what is worked out from them."""
