"""`colorfilter openlineage`: the ledger as OpenLineage events."""
