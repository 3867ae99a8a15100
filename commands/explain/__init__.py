"""`colorfilter explain`: why a document was selected or not, and what changed in a dataset."""
