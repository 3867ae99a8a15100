"""Dagster resources: artifacts and ledger of the home, the score store and the GPU."""
