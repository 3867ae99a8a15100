"""`colorfilter forget`: remove documents permanently."""
