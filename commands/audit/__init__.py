"""`colorfilter audit`: whether a home holds what its ledger says."""
