"""`colorfilter openlineage`: export the ledger as OpenLineage events."""
