"""Sources, shards, the sample and domains as text and as packed tokens."""
