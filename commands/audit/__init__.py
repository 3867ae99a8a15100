"""`colorfilter audit`: check a home against its ledger."""
